//! Documents packed into one sequence are to a model what each is alone.

use crate::decode::{all, logits};
use crate::model::{close, weights};
use stages::models::{Keep, Model};
use stages::ops::Dims;

/// Three documents, each beginning with the separator, lengths that share no chunk border.
fn documents() -> Vec<Vec<u32>> {
    let document = |(first, len): (u32, u32)| {
        let rest = (1..len).map(|i| 1 + (first + i * i * 31) % 36);
        std::iter::once(0).chain(rest).collect()
    };
    [(3, 17), (8, 2), (5, 38)].into_iter().map(document).collect()
}

#[test]
fn a_packed_batch_equals_its_documents_alone() {
    for config in all(Some(0)) {
        let model = Model::new(config).unwrap();
        let params = weights(&model);
        let packed = documents().concat();
        let v = model.config.vocab;
        let together = logits(&model, &params, &packed);
        let mut at = 0;
        for document in documents() {
            let alone = logits(&model, &params, &document);
            let what = format!("{:?} {:?} from {at}", model.config.family, model.config.layers);
            close(&what, &together[at * v..][..alone.len()], &alone, 2e-5);
            at += document.len();
        }
        let mut leaky = model.config.clone();
        leaky.separator = None;
        let leaky = Model::new(leaky).unwrap();
        let seen = logits(&leaky, &params, &packed);
        let apart = seen[17 * v..].iter().zip(&together[17 * v..]).map(|(a, b)| (a - b).abs());
        assert!(apart.fold(0.0, f32::max) > 1e-2, "without a separator documents would mix");
    }
}

#[test]
fn gradients_do_not_cross_documents_either() {
    for config in all(Some(0)) {
        let model = Model::new(config).unwrap();
        let params = weights(&model);
        let packed = documents().concat();
        let v = model.config.vocab;
        // What the first document says does not change what the others teach.
        let gradient = |tokens: &[u32]| {
            let mut pass = model.pass(Dims { batch: 1, seq: tokens.len() }, Keep::Backward);
            pass.tokens_n.copy_from_slice(tokens);
            model.forward(&params.flat, &mut pass, |_, _, _| {});
            let mut grads = vec![0.0; params.flat.len()];
            let rows = tokens.len() - 38..tokens.len();
            let mut d_logits = vec![0.0; 38 * v];
            model.logits(&params.flat, &pass, rows.clone(), &mut d_logits);
            let all = stages::models::Trained::ALL;
            let none = vec![0.0; (tokens.len() - 38) * v];
            let before = 0..tokens.len() - 38;
            model.head_backward(&params.flat, &mut pass, before, &none, all, &mut grads);
            model.head_backward(&params.flat, &mut pass, rows, &d_logits, all, &mut grads);
            model.backward(&params.flat, &mut pass, all, &mut grads);
            grads
        };
        let one = gradient(&packed);
        let mut other = packed.clone();
        other[1..10].iter_mut().for_each(|token| *token = *token % 36 + 1);
        close("gradients", &gradient(&other), &one, 1e-6);
    }
}
