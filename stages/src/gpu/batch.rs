//! The tokens of a micro-batch on the device, and how the next ones get there in the background.

use anyhow::Result;

use super::launch::{Buf, Gpu, Pinned, Slice};
use super::ops::embed;
use crate::models::model::document_starts;
use crate::ops::Dims;
use crate::ops::cross_entropy::successors;

/// Micro-batches whose tokens the host may be ahead of the device.
const AHEAD: usize = 4;

/// Tokens, where their documents start, and their order by number.
pub struct Batch {
    gpu: Gpu,
    dims: Dims,
    tokens_n: Buf<u32>,
    starts_n: Buf<u32>,
    order_n: Buf<u32>,
    targets_n: Option<Buf<u32>>,
    /// One for each of [`AHEAD`]: tokens, starts, order, targets.
    host: Vec<Pinned<u32>>,
    marks: Vec<usize>,
    sent: usize,
}

impl Batch {
    /// Room for `dims`.
    pub fn new(gpu: &Gpu, dims: Dims) -> Result<Batch> {
        let n = dims.tokens();
        let host = (0..AHEAD).map(|_| gpu.pinned(4 * n)).collect::<Result<_>>()?;
        Ok(Batch {
            gpu: gpu.clone(),
            dims,
            tokens_n: gpu.zeros("tokens", n)?,
            starts_n: gpu.zeros("document starts", n)?,
            order_n: gpu.zeros("order of tokens", n)?,
            targets_n: None,
            host,
            marks: vec![0; AHEAD],
            sent: 0,
        })
    }

    /// Also sends the token that follows each from now on: [`Batch::targets_n`].
    pub fn with_targets(mut self) -> Result<Batch> {
        self.want_targets()?;
        Ok(self)
    }

    /// The same.
    pub fn want_targets(&mut self) -> Result<()> {
        self.targets_n = Some(self.gpu.zeros("tokens that follow", self.tokens_n.len())?);
        Ok(())
    }

    /// Holds `dims` from now on, of no more tokens than there is room for.
    pub fn reshape(&mut self, dims: Dims) {
        let (n, room) = (dims.tokens(), self.tokens_n.len());
        assert!(n <= room, "{n} tokens in a batch of {room}");
        self.dims = dims;
    }

    /// Batch and length.
    pub fn dims(&self) -> Dims {
        self.dims
    }

    fn part(&self, of: &Buf<u32>) -> Slice<u32> {
        of.all().range(0..self.dims.tokens())
    }

    /// The tokens.
    pub fn tokens_n(&self) -> Slice<u32> {
        self.part(&self.tokens_n)
    }

    /// See [`crate::ops`].
    pub fn starts_n(&self) -> Slice<u32> {
        self.part(&self.starts_n)
    }

    /// Numbers of the tokens by their ids.
    pub fn order_n(&self) -> Slice<u32> {
        self.part(&self.order_n)
    }

    /// The token that follows each in its sequence, as [`successors`] has it.
    pub fn targets_n(&self) -> Slice<u32> {
        self.part(self.targets_n.as_ref().expect("a batch that was asked for them"))
    }

    /// Sends what `fill` writes: the tokens of sequence `i`. Waits only where the host is too far
    /// ahead. `ordered`: whether the order is needed.
    pub fn send(
        &mut self,
        separator: Option<u32>,
        ordered: bool,
        fill: impl FnMut(usize, &mut [u32]),
    ) -> Result<()> {
        self.send_some(separator, ordered, self.dims.batch, fill)
    }

    /// The same of the first `count` sequences; the others are zeros without targets.
    pub fn send_some(
        &mut self,
        separator: Option<u32>,
        ordered: bool,
        count: usize,
        mut fill: impl FnMut(usize, &mut [u32]),
    ) -> Result<()> {
        let (slot, n, seq) = (self.sent % AHEAD, self.dims.tokens(), self.dims.seq);
        if self.sent >= AHEAD {
            self.gpu.passed(self.marks[slot])?;
        }
        let (tokens, rest) = self.host[slot].values_mut()[..4 * n].split_at_mut(n);
        let (starts, rest) = rest.split_at_mut(n);
        let (order, targets) = rest.split_at_mut(n);
        tokens[count * seq..].fill(0);
        tokens.chunks_exact_mut(seq).enumerate().take(count).for_each(|(i, out)| fill(i, out));
        document_starts(separator, seq, tokens, starts);
        if ordered {
            order.copy_from_slice(&embed::order(tokens));
        }
        if self.targets_n.is_some() {
            successors(seq, &tokens[..count * seq], targets);
        }
        let host = &self.host[slot];
        self.gpu.upload_later(self.tokens_n(), host, 0..n);
        self.gpu.upload_later(self.starts_n(), host, n..2 * n);
        if ordered {
            self.gpu.upload_later(self.order_n(), host, 2 * n..3 * n);
        }
        if self.targets_n.is_some() {
            self.gpu.upload_later(self.targets_n(), host, 3 * n..4 * n);
        }
        self.marks[slot] = self.gpu.mark();
        self.sent += 1;
        Ok(())
    }

    /// Sends where documents start, for activations that come without tokens.
    pub fn send_starts(&mut self, starts: &[u32]) {
        self.gpu.upload(self.starts_n(), starts);
    }
}
