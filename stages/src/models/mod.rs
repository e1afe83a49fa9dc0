//! One `Model` for teachers, students and hybrids: configuration, parameters, blocks, files.

pub mod attention;
pub mod block;
pub mod config;
pub mod file;
pub mod mixer;
pub mod model;
pub mod params;
pub mod ssm;
pub mod start;
pub mod transfer;

pub use block::{Block, Trained};
pub use config::{Config, MixerKind};
pub use mixer::{Mixer, Scene};
pub use model::{Keep, Model, Pass};
pub use params::{Builder, Entry, Init, Layout, Params, Part, Slot, Span};
