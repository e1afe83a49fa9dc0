//! From what a checkpoint says of itself to a [`Config`], and from its names to ours: one file for
//! each way of saying it. Knows no bytes of weights.

pub mod gguf;
pub mod hub;

/// A tensor of ours: `rows` of the source tensor `name`, from `first`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// What the checkpoint calls it.
    pub name: String,
    /// Only these rows of it, `first..first + rows`; `None`: all.
    pub rows: Option<(usize, usize)>,
    /// Its rows are those of so many heads, in the order for rotating adjacent pairs.
    pub paired_heads: Option<usize>,
}

impl Origin {
    /// The whole tensor `name` as it is.
    pub fn whole(name: impl Into<String>) -> Origin {
        Origin { name: name.into(), rows: None, paired_heads: None }
    }

    /// Whether nothing has to be moved.
    pub fn is_whole(&self) -> bool {
        self.rows.is_none() && self.paired_heads.is_none()
    }
}
