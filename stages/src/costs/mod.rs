//! What stages take of the machine, told before they run, from parameters and the sizes of their
//! inputs. Pure but for [`describe`], which reads the heads of files.
//!
//! `about` is what is known of an artifact, `sizes` counts parameters, operations and bytes of models,
//! `files` bytes of files; the others are the stages' models: `text` (tokens from text), `teacher`
//! (what runs a model), `training` (what trains one).
//!
//! No byte of a result depends on anything here, so that it is no part of a stage's version.

pub mod about;
pub mod files;
pub mod sizes;
mod teacher;
mod text;
mod training;

pub use about::{About, describe};
