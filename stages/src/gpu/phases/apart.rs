//! Layers that are trained apart from each other, beside one teacher: their learners and blocks.

use anyhow::Result;

use super::teacher::Teacher;
use crate::gpu::launch::Gpu;
use crate::gpu::learners::{Learners, Member};
use crate::gpu::model::block::Block;
use crate::gpu::weights::{Places, Twin};
use crate::models::{Config, Model, Slot, Trained};
use crate::train::layer::Layer;

/// Number and block of each layer.
pub type Blocks = Vec<(usize, Block)>;

/// Uploads what is trained of `layers`, one after the other: their mixers, and all else with the
/// MLPs. What is frozen is `teacher`'s, of `model`.
pub fn upload(
    gpu: &Gpu,
    (model, teacher): (&Model, &Teacher),
    config: &Config,
    layers: &[Layer],
    trained: Trained,
) -> Result<(Learners, Blocks)> {
    let mut base = 0;
    let members = layers.iter().map(|layer| {
        let ssm = layer.ssm();
        let own = [ssm.in_proj, ssm.z_bias, ssm.conv, ssm.conv_bias, ssm.d, ssm.out];
        let keep = |slot: Slot| trained.mlps || own.contains(&slot);
        let places = Places::of_block(&layer.block, base, keep);
        base = places.end();
        Member {
            name: layer.learner.name.clone(),
            host: layer.learner.params.clone(),
            places,
            groups: layer.learner.groups.clone(),
        }
    });
    let members = members.collect();
    let learners = Learners::new(gpu, members, layers[0].learner.clip)?;
    let blocks = layers.iter().enumerate().map(|(at, layer)| {
        let twin = Twin::new(&layer.block, &model.blocks[layer.number], teacher.bank());
        let bank = learners.bank(at, Some(Box::new(twin)));
        (layer.number, Block::new(&layer.block, config, &bank, trained))
    });
    let blocks = blocks.collect();
    Ok((learners, blocks))
}
