//! All the ML. Every file here is a stage; every folder is shared by stages.

pub mod align;
pub mod assemble;
pub mod cache_teacher;
pub mod data;
pub mod distill;
pub mod eval;
pub mod evaluate;
pub mod foreign;
pub mod formats;
pub mod generate;
pub mod gpu;
pub mod models;
pub mod ops;
pub mod orient;
pub mod pretrain;
pub mod sample_teacher;
pub mod teacher;
pub mod text;
pub mod tokenize;
pub mod tokenizer;
pub mod train;
pub mod train_tokenizer;

use engine::stage::Entry;

/// Every stage, in the order of a pipeline.
pub const ALL: &[Entry] = &[
    Entry::of::<text::Text>(),
    Entry::of::<train_tokenizer::TrainTokenizer>(),
    Entry::of::<tokenize::Tokenize>(),
    Entry::of::<pretrain::Pretrain>(),
    Entry::of::<teacher::Teacher>(),
    Entry::of::<sample_teacher::SampleTeacher>(),
    Entry::of::<cache_teacher::CacheTeacher>(),
    Entry::of::<orient::Orient>(),
    Entry::of::<align::Align>(),
    Entry::of::<assemble::Assemble>(),
    Entry::of::<distill::Distill>(),
    Entry::of::<evaluate::Evaluate>(),
    Entry::of::<engine::command::Command>(),
];
