//! A pickle machine that can only build what a state dict is made of: None, truth values, numbers,
//! texts, tuples, lists, dicts and tensors of `torch.save`. It calls nothing, so a hostile file can
//! at worst be refused. Knows state dicts; knows no archive: tensors name their storages.

mod machine;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};

use machine::{Id, Machine, Node, Parts};

/// A larger pickle holds no state dict: that is a few hundred bytes per tensor.
const MAX_BYTES: usize = 16 << 20;
/// Tensors of a state dict, dimensions of a tensor.
const MAX_TENSORS: usize = 1 << 17;
const MAX_DIMS: usize = 8;

/// The element type of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    Float,
    Half,
    BFloat16,
    Double,
    Long,
    Int,
    Short,
    Char,
    Byte,
    Bool,
}

/// A tensor: a view of a storage. Nothing is checked against the storage's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// The storage's key: the archive's entry `data/KEY`.
    pub storage: String,
    /// Its element type.
    pub element: Element,
    /// Its length in elements.
    pub length: usize,
    /// The first element of the view.
    pub offset: usize,
    /// The view's sizes, and for each the distance of neighbours in elements.
    pub shape: Vec<usize>,
    pub stride: Vec<usize>,
}

/// The tensors of a state dict, which is the top-level dict or its entry `state_dict` or `model`.
pub fn tensors(bytes: &[u8]) -> Result<BTreeMap<String, View>> {
    if bytes.len() > MAX_BYTES {
        bail!("a pickle of {} bytes is no state dict (at most {MAX_BYTES})", bytes.len());
    }
    let mut machine = Machine::new(bytes);
    let top = machine.run()?;
    state_dict(&machine, top)
}

fn dict<'m>(machine: &'m Machine, id: Id) -> Option<&'m [(Id, Id)]> {
    match machine.node(id) {
        Node::Dict(items) => Some(items),
        _ => None,
    }
}

fn state_dict(machine: &Machine, top: Id) -> Result<BTreeMap<String, View>> {
    let Some(top) = dict(machine, top) else {
        bail!("the file holds {}, wanted a state dict", machine.node(top).what());
    };
    let wrapped = ["state_dict", "model"].iter().find_map(|wrapper| {
        let named =
            |(key, _): &&(Id, Id)| matches!(machine.node(*key), Node::Str(s) if s == wrapper);
        dict(machine, top.iter().find(named)?.1)
    });
    let items = wrapped.unwrap_or(top);
    if items.len() > MAX_TENSORS {
        bail!("the state dict has {} tensors (at most {MAX_TENSORS})", items.len());
    }
    let mut tensors = BTreeMap::new();
    for &(key, value) in items {
        let Node::Str(name) = machine.node(key) else {
            bail!("the state dict has {} for a name", machine.node(key).what());
        };
        let Node::Tensor(parts) = machine.node(value) else {
            bail!("`{name}` of the state dict is {}, no tensor", machine.node(value).what());
        };
        let view = view(machine, parts).with_context(|| format!("tensor `{name}`"))?;
        if tensors.insert(name.to_string(), view).is_some() {
            bail!("the state dict has two tensors `{name}`");
        }
    }
    Ok(tensors)
}

fn view(machine: &Machine, parts: &Parts) -> Result<View> {
    let Node::Storage { key, element, length } = *machine.node(parts.storage) else {
        bail!("it has {} for a storage", machine.node(parts.storage).what());
    };
    let (Node::Tuple(shape), Node::Tuple(stride)) =
        (machine.node(parts.shape), machine.node(parts.stride))
    else {
        bail!("its sizes or strides are no tuple");
    };
    if shape.len() != stride.len() || shape.len() > MAX_DIMS {
        bail!("it has {} sizes and {} strides", shape.len(), stride.len());
    }
    let sizes = |ids: &[Id]| ids.iter().map(|&id| machine.node(id).size()).collect::<Result<_>>();
    Ok(View {
        storage: key.to_string(),
        element,
        length,
        offset: machine.node(parts.offset).size()?,
        shape: sizes(shape)?,
        stride: sizes(stride)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TENSOR: &[u8] = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n\
        HalfStorage\nX\x01\0\0\x007X\x03\0\0\0cpuK\x08tQK\x02K\x03\x85K\x01\x85\x89}tR";

    fn read(parts: &[&[u8]]) -> Result<BTreeMap<String, View>> {
        tensors(&[&b"\x80\x02"[..], &parts.concat(), b"."].concat())
    }

    fn error(parts: &[&[u8]]) -> String {
        format!("{:#}", read(parts).unwrap_err())
    }

    #[test]
    fn a_tensor_in_a_dict() {
        let wanted = View {
            storage: "7".into(),
            element: Element::Half,
            length: 8,
            offset: 2,
            shape: vec![3],
            stride: vec![1],
        };
        let found = read(&[b"}X\x01\0\0\0a", TENSOR, b"s"]).unwrap();
        assert_eq!(found, BTreeMap::from([("a".to_string(), wanted)]));
        // Wrapped, beside things that are no tensors.
        let found = read(&[b"}(X\x05\0\0\0epochK\x03X\x05\0\0\0model}U\x01a", TENSOR, b"su"]);
        assert_eq!(found.unwrap().len(), 1);
    }

    #[test]
    fn what_is_no_tensor_is_refused_by_name() {
        let text = error(&[b"cos\nsystem\nX\x02\0\0\0ls\x85R"]);
        assert!(text.contains("wants `os.system`; only dicts of plain tensors"), "{text}");
        let text = error(&[b"\x8c\x08builtins\x8c\x04eval\x93"]);
        assert!(text.contains("`builtins.eval`"), "{text}");
        let text = error(&[b"}U\x01aK\x01s"]);
        assert_eq!(text, "`a` of the state dict is a number, no tensor");
        let text = error(&[b"}(U\x01a", TENSOR, b"U\x01a", TENSOR, b"u"]);
        assert_eq!(text, "the state dict has two tensors `a`");
        assert!(error(&[b"]"]).contains("the file holds a list"));
        assert!(error(&[b"N}s"]).contains("a value is missing"));
        assert!(error(&[b"I1\n"]).contains("opcode 0x49"));
    }

    #[test]
    fn depth_costs_no_stack() {
        let deep = [vec![b']'; 300_000], vec![b'a'; 299_999]].concat();
        assert!(error(&[&deep]).contains("the file holds a list"));
        assert!(error(&[&[b'('; 2000]]).contains("nested too deeply"));
        // A list that holds itself.
        assert!(error(&[b"]q\0h\0a"]).contains("the file holds a list"));
    }

    #[test]
    fn copies_are_counted() {
        // A long list, made into a dict again and again.
        let pairs = b"NN\x86q\x01".iter().copied().chain(b"h\x01".repeat(1000));
        let list: Vec<u8> = b"]q\0(".iter().copied().chain(pairs).chain(*b"e0").collect();
        let one = b"ccollections\nOrderedDict\nh\0\x85R0".repeat(3000);
        assert!(error(&[&list, &one, b"}"]).contains("more than 2097152 objects"));
    }
}
