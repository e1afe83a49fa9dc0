//! From a teacher to its student: the student's configuration, and the weights they share.
//!
//! Everything but the mixers is the teacher's: embedding, norms, MLPs, head, and the attention of
//! layers that keep it. Knows names on both sides, no files.

use anyhow::{Result, bail};

use super::config::{Config, MixerKind};
use super::params::{FileTensor, Layout, Params, Part};

/// Sizes of the mixers that replace attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// State size N of a head.
    pub state: usize,
    /// Taps of the convolution.
    pub taps: usize,
    /// Chunk length of the scan.
    pub chunk: usize,
}

/// The student of `teacher` in which every layer but those of `keep` is Discrete Mamba-2, one
/// head for each query head, as wide as it.
pub fn student_config(teacher: &Config, sizes: Sizes, keep: &[usize]) -> Config {
    let kind = |layer| match keep.contains(&layer) {
        true => MixerKind::Attention,
        false => MixerKind::Ssm,
    };
    Config {
        layers: (0..teacher.layers.len()).map(kind).collect(),
        d_state: sizes.state,
        d_conv: sizes.taps,
        chunk: sizes.chunk,
        ..teacher.clone()
    }
}

/// Copies into `to` (parameters of `config`, maybe of some blocks only) every selected tensor that
/// the teacher has too; mixers of kind `ssm` have none. A shared tensor that the teacher lacks, or
/// has in another shape, is an error.
pub fn copy_shared(
    (from_config, from): (&Config, &Params),
    (config, layout): (&Config, &Layout),
    to: &mut [f32],
    select: impl Fn(Part) -> bool,
) -> Result<()> {
    for file in layout.files().iter().filter(|file| select(file.part)) {
        if let Part::Mixer(layer) = file.part
            && config.layers[layer] == MixerKind::Ssm
        {
            continue;
        }
        let name = counterpart(config, from_config, file);
        let found = from.layout().files().iter().find(|f| f.name == name);
        let Some(found) = found else {
            bail!("the teacher has no tensor `{name}`, which `{}` is copied from", file.name)
        };
        if found.shape != file.shape {
            let (a, b) = (&found.shape, &file.shape);
            bail!("the teacher's `{name}` is {a:?}, but the student's `{}` is {b:?}", file.name);
        }
        to[file.range.clone()].copy_from_slice(&from.flat[found.range.clone()]);
    }
    Ok(())
}

/// What `to` calls the tensor that `file` is in `from`.
fn counterpart(from: &Config, to: &Config, file: &FileTensor) -> String {
    let (a, b) = (from.names(), to.names());
    match file.part {
        Part::Embedding => b.embedding.into(),
        Part::FinalNorm => file.name.replacen(a.norm, b.norm, 1),
        Part::Head => file.name.clone(),
        Part::Mixer(layer) => {
            let (a, b) = (from.mixer_prefix(layer), to.mixer_prefix(layer));
            file.name.replacen(&a, &b, 1)
        }
        Part::Norm(_) | Part::Mlp(_) => file.name.replacen(a.layers, b.layers, 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::Model;

    fn teacher(tied: bool) -> Model {
        Model::new(Config {
            vocab: 9,
            d_model: 8,
            layers: vec![MixerKind::Attention; 3],
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            ffn: 6,
            tied,
            ..Config::default()
        })
        .unwrap()
    }

    #[test]
    fn everything_but_the_new_mixers_is_the_teachers() {
        for tied in [false, true] {
            let teacher = teacher(tied);
            let weights = teacher.init(1);
            let sizes = Sizes { state: 4, taps: 4, chunk: 8 };
            let student = Model::new(student_config(&teacher.config, sizes, &[1])).unwrap();
            let mut params = vec![f32::NAN; student.layout.len()];
            let (from, to) = ((&teacher.config, &weights), (&student.config, &*student.layout));
            copy_shared(from, to, &mut params, |_| true).unwrap();
            for file in student.layout.files() {
                let copied = params[file.range.clone()].iter().all(|v| !v.is_nan());
                let new = matches!(file.part, Part::Mixer(0 | 2));
                assert_eq!(copied, !new, "{}", file.name);
            }
            let q = student.layout.get("backbone.layers.1.mixer.self_attn.q_proj.weight").unwrap();
            let same = weights.named("model.layers.1.self_attn.q_proj.weight").unwrap();
            assert_eq!(q.slot.of(&params), same);
        }
    }
}
