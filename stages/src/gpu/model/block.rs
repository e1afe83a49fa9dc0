//! One block over its places on the device; see [`crate::models::block`].

use half::bf16;

use super::Scene;
use super::acts::{Acts, MixerActs};
use super::attention::Attention;
use super::mlp::Mlp;
use super::norm::Norm;
use super::room::Room;
use super::ssm::Ssm;
use crate::gpu::gemm::Mat;
use crate::gpu::launch::{Gpu, Slice};
use crate::gpu::weights::Bank;
use crate::models::{self, Config, Trained};

/// A sequence mixer.
pub enum Mixer {
    /// Causal softmax attention.
    Attention(Attention),
    /// Discrete Mamba-2.
    Ssm(Ssm),
}

/// Norms, mixer and MLP.
pub struct Block {
    /// Width of the residual stream.
    pub d: usize,
    /// The norm before the mixer.
    pub norm1: Norm,
    /// The mixer.
    pub mixer: Mixer,
    /// The norm before the MLP, unless it shares the mixer's.
    pub norm2: Option<Norm>,
    /// The MLP.
    pub mlp: Mlp,
    trained: Trained,
}

impl Block {
    /// `of` with the parameters in `bank`; `trained` says what gets gradients.
    pub fn new(of: &models::Block, config: &Config, bank: &Bank, trained: Trained) -> Block {
        let learn = trained.mixer(of.mixer.kind());
        let mixer = match &of.mixer {
            models::Mixer::Attention(attention) => {
                Mixer::Attention(Attention::new(attention, bank, learn))
            }
            models::Mixer::Ssm(ssm) => Mixer::Ssm(Ssm::new(ssm, bank, learn)),
        };
        Block {
            d: config.d_model,
            norm1: Norm::new(of.norm1, bank, trained.norms),
            mixer,
            norm2: of.norm2.map(|norm| Norm::new(norm, bank, trained.norms)),
            mlp: Mlp::new(&of.mlp, bank, trained.mlps),
            trained,
        }
    }

    /// The mixer of a block that has no attention.
    pub fn ssm(&self) -> &Ssm {
        match &self.mixer {
            Mixer::Ssm(ssm) => ssm,
            Mixer::Attention(_) => unreachable!("a student's block in training has an `ssm` mixer"),
        }
    }

    fn mat(&self, at: Slice<bf16>) -> Mat {
        Mat::new(at, self.d)
    }

    /// The norm and the mixer: fills [`Acts::x1_nd`] and [`Acts::mid_nd`].
    pub fn forward_mixer(&self, gpu: &Gpu, scene: Scene, u_nd: Slice<bf16>, acts: &Acts) {
        let n = scene.dims.tokens();
        self.norm1.forward(gpu, n, u_nd, acts.x1_nd.all(), &acts.stats1);
        self.forward_mixer_from(gpu, scene, u_nd, acts.x1_nd.all(), acts);
    }

    /// The same from a normed input that is there already.
    pub fn forward_mixer_from(
        &self,
        gpu: &Gpu,
        scene: Scene,
        u_nd: Slice<bf16>,
        x1_nd: Slice<bf16>,
        acts: &Acts,
    ) {
        let (x, to) = (self.mat(x1_nd), (self.mat(acts.mid_nd.all()), self.mat(u_nd)));
        match (&self.mixer, &acts.mixer) {
            (Mixer::Attention(mixer), MixerActs::Attention(own)) => {
                mixer.forward(gpu, scene, x, own.all(), to);
            }
            (Mixer::Ssm(mixer), MixerActs::Ssm(own)) => {
                mixer.forward(gpu, scene, x, own.all(), to);
            }
            _ => unreachable!("a mixer met the buffers of another kind"),
        }
    }

    /// The MLP after the mixer: `out = mid + mlp(…)`.
    pub fn forward_mlp(&self, gpu: &Gpu, scene: Scene, out_nd: Slice<bf16>, acts: &Acts) {
        let n = scene.dims.tokens();
        if let (Some(norm), Some(x2), Some(stats)) = (self.norm2, &acts.x2_nd, &acts.stats2) {
            norm.forward(gpu, n, acts.mid_nd.all(), x2.all(), stats);
        }
        self.forward_mlp_from(gpu, scene, acts.mlp_input(), out_nd, acts);
    }

    /// The same from the MLP's normed input.
    pub fn forward_mlp_from(
        &self,
        gpu: &Gpu,
        scene: Scene,
        x_nd: Slice<bf16>,
        out_nd: Slice<bf16>,
        acts: &Acts,
    ) {
        let to = (self.mat(out_nd), self.mat(acts.mid_nd.all()));
        self.mlp.forward(gpu, scene.dims.tokens(), self.mat(x_nd), acts.mlp(), to);
    }

    /// The whole block, `u_nd` → `out_nd`.
    pub fn forward(
        &self,
        gpu: &Gpu,
        scene: Scene,
        u_nd: Slice<bf16>,
        out_nd: Slice<bf16>,
        acts: &Acts,
    ) {
        self.forward_mixer(gpu, scene, u_nd, acts);
        self.forward_mlp(gpu, scene, out_nd, acts);
    }

    /// From the gradient of the output, `d_out_nd`, to that of [`Acts::mid_nd`], in `d_mid_nd`
    /// (which may be the same). Side by side `mid` gets the output's, and what the norm gets from
    /// the MLP waits in `room` for [`Block::backward_mixer`].
    pub fn backward_mlp(
        &self,
        gpu: &Gpu,
        scene: Scene,
        (x1_nd, d_out_nd, d_mid_nd): (Slice<bf16>, Slice<bf16>, Slice<bf16>),
        acts: &Acts,
        room: &Room,
    ) {
        let n = scene.dims.tokens();
        let x = (self.mat(acts.x2_nd.as_ref().map_or(x1_nd, |x2| x2.all())), acts.mlp());
        let d_x = self.mat(room.d_x_nd.all());
        self.mlp.backward(gpu, n, x, self.mat(d_out_nd), (d_x, false), room);
        match (self.norm2, &acts.stats2) {
            (Some(norm), Some(stats)) => {
                let seen = (acts.mid_nd.all(), stats);
                norm.backward(gpu, n, d_x.at, None, seen, Some(d_out_nd), d_mid_nd, room);
            }
            _ if d_out_nd != d_mid_nd => gpu.copy(d_out_nd, d_mid_nd),
            _ => {}
        }
    }

    /// From the gradient of [`Acts::mid_nd`] to that of the block's input, `d_u_nd` (which may be
    /// the same), if it is wanted. `after_mlp`: whether [`Block::backward_mlp`] ran before.
    #[expect(clippy::too_many_arguments, reason = "a backward pass touches this many buffers")]
    pub fn backward_mixer(
        &self,
        gpu: &Gpu,
        scene: Scene,
        (u_nd, x1_nd): (Slice<bf16>, Slice<bf16>),
        (d_mid_nd, d_u_nd): (Slice<bf16>, Option<Slice<bf16>>),
        after_mlp: bool,
        acts: &Acts,
        room: &Room,
    ) {
        let n = scene.dims.tokens();
        let (x, d_mid) = (self.mat(x1_nd), self.mat(d_mid_nd));
        let shared = after_mlp && self.norm2.is_none();
        // Side by side the norm's gradient has two parts: the MLP's waits in one buffer.
        let d_x_nd = if shared { room.d_y_nd.all() } else { room.d_x_nd.all() };
        let d_x = d_u_nd.map(|_| self.mat(d_x_nd));
        match (&self.mixer, &acts.mixer) {
            (Mixer::Attention(mixer), MixerActs::Attention(own)) => {
                mixer.backward(gpu, scene, (x, own.all()), d_mid, d_x, room);
            }
            (Mixer::Ssm(mixer), MixerActs::Ssm(own)) => {
                mixer.backward(gpu, scene, (x, own.all()), d_mid, d_x, room);
            }
            _ => unreachable!("a mixer met the buffers of another kind"),
        }
        if let Some(d_u_nd) = d_u_nd {
            let second = shared.then(|| room.d_x_nd.all());
            let seen = (u_nd, &acts.stats1);
            self.norm1.backward(gpu, n, d_x_nd, second, seen, Some(d_mid_nd), d_u_nd, room);
        }
    }

    /// Turns the gradient of the block's output, `d_nd`, into that of its input, in place.
    pub fn backward(
        &self,
        gpu: &Gpu,
        scene: Scene,
        u_nd: Slice<bf16>,
        d_nd: Slice<bf16>,
        acts: &Acts,
        room: &Room,
    ) {
        let x1_nd = acts.x1_nd.all();
        self.backward_mlp(gpu, scene, (x1_nd, d_nd, d_nd), acts, room);
        let seen = (u_nd, x1_nd);
        self.backward_mixer(gpu, scene, seen, (d_nd, Some(d_nd)), true, acts, room);
    }

    /// What gets gradients.
    pub fn trained(&self) -> Trained {
        self.trained
    }
}
