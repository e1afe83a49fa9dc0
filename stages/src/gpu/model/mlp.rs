//! The MLP of a block over its places on the device; see [`crate::models::mlp`].

use half::bf16;

use super::linear::Linear;
use super::room::Room;
use crate::gpu::gemm::Mat;
use crate::gpu::launch::{Gpu, Slice};
use crate::gpu::ops::mlp as op;
use crate::gpu::weights::Bank;
use crate::models::{MlpKind, mlp};

/// Where its maps lie.
#[derive(Clone, Copy)]
pub struct Mlp {
    /// Gated or not.
    pub kind: MlpKind,
    /// Hidden width.
    pub ffn: usize,
    /// Gate and up as one, or fc1.
    pub into: Linear,
    /// Back to the model's width.
    pub out: Linear,
}

/// Activations of an MLP, `[n, into.outputs]` and `[n, ffn]`.
#[derive(Clone, Copy)]
pub struct Acts {
    /// Before the activation; not there where nothing goes back.
    pub into_nw: Option<Slice<bf16>>,
    /// After it.
    pub act_nf: Slice<bf16>,
}

impl Mlp {
    /// With gradients if `learn`.
    pub fn new(of: &mlp::Mlp, bank: &Bank, learn: bool) -> Mlp {
        Mlp {
            kind: of.kind,
            ffn: of.ffn,
            into: Linear::new(of.into, bank, learn),
            out: Linear::new(of.out, bank, learn),
        }
    }

    /// Whether [`Acts::into_nw`] is needed for a pass that goes back or not.
    pub fn keeps_into(&self, back: bool) -> bool {
        back || self.kind == MlpKind::Swiglu || self.into.b.is_none()
    }

    /// `out = add + mlp(x)`.
    pub fn forward(&self, gpu: &Gpu, n: usize, x: Mat, acts: Acts, (out, add): (Mat, Mat)) {
        let Acts { into_nw, act_nf } = acts;
        match (self.kind, into_nw) {
            (MlpKind::Gelu, None) => {
                self.into.forward_gelu(gpu, "mlp.into", n, (x, Mat::new(act_nf, self.ffn)));
            }
            (kind, into_nw) => {
                let into = into_nw.expect("there is room for what precedes the activation");
                let wide = Mat::new(into, self.into.outputs);
                self.into.forward(gpu, "mlp.into", n, (x, wide), None);
                match kind {
                    MlpKind::Swiglu => op::swiglu_forward(gpu, (n, self.ffn), into, act_nf),
                    MlpKind::Gelu => op::gelu_forward(gpu, (n, self.ffn), into, None, act_nf),
                }
            }
        }
        self.out.forward(gpu, "mlp.out", n, (Mat::new(act_nf, self.ffn), out), Some(add));
    }

    /// From the output's gradient to the input's, added to what is there if `add`; adds those of
    /// the parameters.
    pub fn backward(
        &self,
        gpu: &Gpu,
        n: usize,
        (x, acts): (Mat, Acts),
        d_out: Mat,
        (d_x, add): (Mat, bool),
        room: &Room,
    ) {
        let into = acts.into_nw.expect("a pass that goes back keeps it");
        let act = Mat::new(acts.act_nf, self.ffn);
        self.out.backward_weight(gpu, "mlp.out.dw", n, (d_out, act), room);
        let d_act = Mat::new(room.d_act_nf.all(), self.ffn);
        self.out.backward_input(gpu, "mlp.out.dx", n, (d_out, d_act), false);
        let d_into = room.d_into_nw.all();
        match self.kind {
            MlpKind::Swiglu => {
                op::swiglu_backward(gpu, (n, self.ffn), d_act.at, into, d_into, None)
            }
            MlpKind::Gelu => {
                op::gelu_backward(gpu, (n, self.ffn), d_act.at, (into, None), d_into, None)
            }
        }
        let d_into = Mat::new(d_into, self.into.outputs);
        self.into.backward_weight(gpu, "mlp.into.dw", n, (d_into, x), room);
        self.into.backward_input(gpu, "mlp.into.dx", n, (d_into, d_x), add);
    }
}
