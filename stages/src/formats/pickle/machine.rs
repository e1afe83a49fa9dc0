//! The pickle machine: runs opcodes (CPython's `pickletools`) over objects in an arena that refer
//! to each other by number, so that neither cycles nor depth cost a stack. Every opcode makes at
//! most one object. Knows what may be made; knows no state dict.

use std::collections::HashMap;

use anyhow::{Context as _, Result, anyhow, bail};

use super::Element;
use crate::formats::bytes::Cursor;

/// Objects in all, values and marks on the stack, bytes of a storage's key.
const MAX_NODES: usize = 2 << 20;
const MAX_STACK: usize = 1 << 20;
const MAX_MARKS: usize = 1000;
const MAX_KEY: usize = 64;

/// The number of an object.
pub type Id = u32;

/// Values that are read off the pickle borrow from it.
pub enum Node<'a> {
    None,
    Bool,
    Int(i64),
    Float,
    Str(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage { key: &'a str, element: Element, length: usize },
    Tensor(Parts),
}

/// What a tensor is made of; most tensors of a hostile pickle are never asked for.
#[derive(Clone, Copy)]
pub struct Parts {
    pub storage: Id,
    pub offset: Id,
    pub shape: Id,
    pub stride: Id,
}

/// The globals that mean something.
#[derive(Clone, Copy)]
pub enum Global {
    OrderedDict,
    Tensor,
    Parameter,
    Storage(Element),
}

/// A machine that runs one pickle.
#[derive(Default)]
pub struct Machine<'a> {
    cursor: Cursor<'a>,
    nodes: Vec<Node<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Items that were copied, which count as objects.
    copied: usize,
}

impl Global {
    fn named(module: &str, name: &str) -> Result<Global> {
        let element = |name: &str| {
            Some(match name.strip_suffix("Storage")? {
                "Float" => Element::Float,
                "Half" => Element::Half,
                "BFloat16" => Element::BFloat16,
                "Double" => Element::Double,
                "Long" => Element::Long,
                "Int" => Element::Int,
                "Short" => Element::Short,
                "Char" => Element::Char,
                "Byte" => Element::Byte,
                "Bool" => Element::Bool,
                _ => return None,
            })
        };
        let found = match (module, name) {
            ("collections", "OrderedDict") => Some(Global::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Global::Tensor),
            ("torch._utils", "_rebuild_parameter") => Some(Global::Parameter),
            ("torch", name) => element(name).map(Global::Storage),
            _ => None,
        };
        found.ok_or_else(|| {
            anyhow!(
                "the pickle wants `{module}.{name}`; only dicts of plain tensors are unpickled \
                 (save the model's state dict, best as safetensors)"
            )
        })
    }
}

impl<'a> Machine<'a> {
    /// A machine before the first opcode of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Machine<'a> {
        Machine { cursor: Cursor::new(bytes, 0), ..Machine::default() }
    }

    /// Runs to the end and gives the result.
    pub fn run(&mut self) -> Result<Id> {
        loop {
            let (at, op) = (self.cursor.at(), self.cursor.u8().context("the pickle never stops")?);
            if op == b'.' {
                let top = self.pop()?;
                if !self.stack.is_empty() {
                    bail!("the pickle leaves {} values behind", self.stack.len());
                }
                return Ok(top);
            }
            self.step(op).with_context(|| format!("byte {at} of the pickle"))?;
            if self.stack.len() > MAX_STACK || self.marks.len() > MAX_MARKS {
                bail!("the pickle is nested too deeply (byte {at})");
            }
        }
    }

    fn step(&mut self, op: u8) -> Result<()> {
        match op {
            0x80 => self.protocol()?,
            0x95 => drop(self.cursor.u64()?),
            b'N' => self.make(Node::None)?,
            0x88 | 0x89 => self.make(Node::Bool)?,
            b'J' | b'K' | b'M' | 0x8a => self.integer(op)?,
            b'G' => {
                self.cursor.take(8)?;
                self.make(Node::Float)?;
            }
            b'X' | b'U' | b'T' | 0x8c | 0x8d => self.text(op)?,
            b'}' => self.make(Node::Dict(Vec::new()))?,
            b']' => self.make(Node::List(Vec::new()))?,
            b')' => self.make(Node::Tuple(Vec::new()))?,
            b'(' => self.marks.push(self.stack.len()),
            b't' => {
                let items = self.pop_mark()?;
                self.make(Node::Tuple(items))?;
            }
            0x85..=0x87 => {
                let mut items = Vec::new();
                for _ in 0x84..op {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.make(Node::Tuple(items))?;
            }
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.memory(op)?,
            b'a' | b'e' | b's' | b'u' => self.fill(op)?,
            b'c' | 0x93 => self.global(op)?,
            b'Q' => self.storage()?,
            b'R' => self.call()?,
            b'b' => self.state()?,
            other => bail!("opcode 0x{other:02x} is not read"),
        }
        Ok(())
    }

    fn make(&mut self, node: Node<'a>) -> Result<()> {
        if self.nodes.len() + self.copied >= MAX_NODES {
            bail!("the pickle has more than {MAX_NODES} objects");
        }
        self.stack.push(self.nodes.len() as Id);
        self.nodes.push(node);
        Ok(())
    }

    /// The object numbered `id`.
    pub fn node(&self, id: Id) -> &Node<'a> {
        &self.nodes[id as usize]
    }

    /// The value on top, which lies above the last mark.
    fn top(&self) -> Result<Id> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let top = self.stack.last().filter(|_| self.stack.len() > floor);
        top.copied().ok_or_else(|| anyhow!("a value is missing"))
    }

    fn pop(&mut self) -> Result<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    /// The values above the last mark.
    fn pop_mark(&mut self) -> Result<Vec<Id>> {
        let floor = self.marks.pop().ok_or_else(|| anyhow!("a mark is missing"))?;
        Ok(self.stack.drain(floor..).collect())
    }

    fn protocol(&mut self) -> Result<()> {
        match self.cursor.u8()? {
            2..=5 => Ok(()),
            other => bail!("protocol {other} is not read, only 2 to 5"),
        }
    }

    fn integer(&mut self, op: u8) -> Result<()> {
        let number = match op {
            b'J' => self.cursor.i32()?.into(),
            b'K' => self.cursor.u8()?.into(),
            b'M' => self.cursor.u16()?.into(),
            _ => {
                let size = self.cursor.u8()?;
                let bytes = self.cursor.take(size.into())?;
                let negative = bytes.last().is_some_and(|&b| b >= 0x80);
                let mut word = [if negative { 0xff } else { 0 }; 8];
                let Some(to) = word.get_mut(..bytes.len()) else {
                    bail!("an integer of {size} bytes");
                };
                to.copy_from_slice(bytes);
                i64::from_le_bytes(word)
            }
        };
        self.make(Node::Int(number))
    }

    fn text(&mut self, op: u8) -> Result<()> {
        let length = match op {
            b'U' | 0x8c => self.cursor.u8()?.into(),
            0x8d => self.cursor.u64()?,
            _ => self.cursor.u32()?.into(),
        };
        let text = std::str::from_utf8(self.cursor.take(length)?).context("a text")?;
        self.make(Node::Str(text))
    }

    /// Puts the top into the memo, or a value from the memo on top.
    fn memory(&mut self, op: u8) -> Result<()> {
        let key = match op {
            b'q' | b'h' => self.cursor.u8()?.into(),
            0x94 => self.memo.len() as u32,
            _ => self.cursor.u32()?,
        };
        if matches!(op, b'h' | b'j') {
            let found = self.memo.get(&key).copied();
            self.stack.push(found.ok_or_else(|| anyhow!("nothing is remembered as {key}"))?);
        } else {
            let top = self.top()?;
            self.memo.insert(key, top);
        }
        Ok(())
    }

    /// Appends to the list or dict below the new items.
    fn fill(&mut self, op: u8) -> Result<()> {
        let new = match op {
            b'a' => vec![self.pop()?],
            b's' => {
                let value = self.pop()?;
                vec![self.pop()?, value]
            }
            _ => self.pop_mark()?,
        };
        let into = self.top()? as usize;
        match (&mut self.nodes[into], op) {
            (Node::List(items), b'a' | b'e') => items.extend(new),
            (Node::Dict(items), b's' | b'u') if new.len().is_multiple_of(2) => {
                items.extend(new.as_chunks().0.iter().map(|&[key, value]| (key, value)));
            }
            _ => bail!("items without a list or dict"),
        }
        Ok(())
    }

    fn global(&mut self, op: u8) -> Result<()> {
        let (module, name) = if op == b'c' {
            let [module, name] =
                [self.cursor.line()?, self.cursor.line()?].map(std::str::from_utf8);
            (module.context("a module's name")?, name.context("a global's name")?)
        } else {
            let (name, module) = (self.pop()?, self.pop()?);
            match (self.node(module), self.node(name)) {
                (&Node::Str(module), &Node::Str(name)) => (module, name),
                _ => bail!("a global without a name"),
            }
        };
        self.make(Node::Global(Global::named(module, name)?))
    }

    /// A persistent id: ("storage", class, key, device, elements).
    fn storage(&mut self) -> Result<()> {
        let id = self.pop()?;
        let Node::Tuple(parts) = self.node(id) else { bail!("a persistent id is no tuple") };
        let parts: Vec<&Node> = parts.iter().map(|&part| self.node(part)).collect();
        let storage = match parts[..] {
            [
                Node::Str("storage"),
                Node::Global(Global::Storage(element)),
                Node::Str(key),
                Node::Str(_),
                length,
            ] if key.len() <= MAX_KEY => {
                Node::Storage { key, element: *element, length: length.size()? }
            }
            _ => bail!("a persistent id is no storage of `torch.save`"),
        };
        self.make(storage)
    }

    fn call(&mut self) -> Result<()> {
        let (args, what) = (self.pop()?, self.pop()?);
        let Node::Tuple(args) = self.node(args) else { bail!("arguments are no tuple") };
        let made = match (self.node(what), &args[..]) {
            (Node::Global(Global::OrderedDict), args) => {
                let items = self.ordered_dict(args)?;
                self.copied += items.len();
                Node::Dict(items)
            }
            // Storage, offset, sizes, strides, requires_grad, hooks; flags if there are any.
            (Node::Global(Global::Tensor), &[storage, offset, shape, stride, _, _]) => {
                Node::Tensor(Parts { storage, offset, shape, stride })
            }
            (Node::Global(Global::Tensor), args) => {
                bail!("a tensor is made of {} things (a conjugate view?), wanted 6", args.len())
            }
            // Tensor, requires_grad, hooks.
            (Node::Global(Global::Parameter), &[tensor, _, _]) => match self.node(tensor) {
                Node::Tensor(parts) => Node::Tensor(*parts),
                other => bail!("a parameter is made of {}, no tensor", other.what()),
            },
            (Node::Global(Global::Parameter), _) => bail!("a parameter has other parts than 3"),
            (other, _) => bail!("{} is called, which is no function", other.what()),
        };
        self.make(made)
    }

    /// `OrderedDict()` or `OrderedDict([(key, value), ...])`.
    fn ordered_dict(&self, args: &[Id]) -> Result<Vec<(Id, Id)>> {
        let items = match *args {
            [] => return Ok(Vec::new()),
            [list] => match self.node(list) {
                Node::List(items) => items,
                other => bail!("an OrderedDict is made of {}", other.what()),
            },
            _ => bail!("an OrderedDict is made of {} things", args.len()),
        };
        if items.len() + self.copied >= MAX_NODES {
            bail!("the pickle has more than {MAX_NODES} objects");
        }
        let pair = |&item: &Id| match self.node(item) {
            Node::List(pair) | Node::Tuple(pair) if pair.len() == 2 => Ok((pair[0], pair[1])),
            other => bail!("an OrderedDict has {} for an item", other.what()),
        };
        items.iter().map(pair).collect()
    }

    /// Attributes of an OrderedDict (`_metadata` of modules) say nothing of weights.
    fn state(&mut self) -> Result<()> {
        self.pop()?;
        let object = self.top()?;
        match self.node(object) {
            Node::Dict(_) => Ok(()),
            _ => bail!("something is given attributes that has none"),
        }
    }
}

impl Node<'_> {
    /// What to call it in a message.
    pub fn what(&self) -> &'static str {
        match self {
            Node::None => "None",
            Node::Bool => "a truth value",
            Node::Int(_) | Node::Float => "a number",
            Node::Str(_) => "a text",
            Node::Tuple(_) => "a tuple",
            Node::List(_) => "a list",
            Node::Dict(_) => "a dict",
            Node::Global(_) => "a class",
            Node::Storage { .. } => "a storage",
            Node::Tensor(_) => "a tensor",
        }
    }

    /// The number of elements that it is.
    pub fn size(&self) -> Result<usize> {
        match self {
            Node::Int(number) => usize::try_from(*number).with_context(|| format!("size {number}")),
            other => bail!("{} is no size", other.what()),
        }
    }
}
