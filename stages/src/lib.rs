//! All the ML. Every file here is a stage; every folder is shared by stages, but for `costs`, which
//! tells what they take.

pub mod align;
pub mod assemble;
pub mod cache_teacher;
pub mod costs;
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
    Entry::costed::<train_tokenizer::TrainTokenizer>(),
    Entry::costed::<tokenize::Tokenize>(),
    Entry::costed::<pretrain::Pretrain>(),
    Entry::costed::<teacher::Teacher>(),
    Entry::costed::<sample_teacher::SampleTeacher>(),
    Entry::costed::<cache_teacher::CacheTeacher>(),
    Entry::costed::<orient::Orient>(),
    Entry::costed::<align::Align>(),
    Entry::costed::<assemble::Assemble>(),
    Entry::costed::<distill::Distill>(),
    Entry::costed::<evaluate::Evaluate>(),
    Entry::of::<engine::command::Command>(),
];
