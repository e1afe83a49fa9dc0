//! Whatever is in a foreign file, it is read the same way twice or refused: no panic, and no
//! allocation that the file's size does not account for.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

use anyhow::Result;
use proptest::prelude::*;
use stages::formats::llama2c::Vocabulary;
use stages::formats::metadata::{Metadata, Value};
use stages::formats::{Checkpoint, Gguf, Llama2c, TorchFile, directory, pickle};

use crate::formats::{fixture, read};

/// The system's allocator, which counts what the watched thread asks for.
struct Watch;

#[global_allocator]
static WATCH: Watch = Watch;

thread_local! {
    /// Bytes so far, and the largest piece.
    static ASKED: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

fn note(size: usize) {
    let add = |asked: &Cell<(usize, usize)>| {
        let (sum, most) = asked.get();
        asked.set((sum.saturating_add(size), most.max(size)));
    };
    // A thread that ends has none left, and is not watched.
    let _ = ASKED.try_with(add);
}

// SAFETY: every call is handed to the system's allocator as it is.
unsafe impl GlobalAlloc for Watch {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promises are the ones that are wanted.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Runs `parse` on a file of `length` bytes and bounds what it asks for.
fn watched<T>(length: usize, parse: impl FnOnce() -> T) -> T {
    ASKED.set((0, 0));
    let made = parse();
    let (sum, most) = ASKED.get();
    assert!(sum <= 256 * length + (1 << 20), "{sum} bytes for a file of {length}");
    assert!(most <= 64 * length + (1 << 18), "{most} bytes at once for a file of {length}");
    made
}

/// Reads everything that an opened file offers.
fn consistent<C: Checkpoint>(length: usize, opened: Result<C>) -> Option<C> {
    let found = match opened {
        Ok(found) => found,
        Err(wrong) => {
            assert!(!format!("{wrong:#}").is_empty(), "an error that says nothing");
            return None;
        }
    };
    let names = found.names();
    assert!(names.windows(2).all(|pair| pair[0] < pair[1]), "{names:?}");
    for name in names {
        let info = found.info(name).unwrap();
        assert!(info.elements() <= 4 * length, "{name} {info:?} in {length} bytes");
        let mut out = vec![0.0; info.elements()];
        let again = found.read_f32(name, &mut out).map(|()| read(&found, name));
        if let Ok(again) = &again {
            assert!(out.iter().zip(again).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}");
        }
        if let Some((dtype, bytes)) = found.plain(name) {
            assert_eq!(bytes.len() * 8, info.elements() * dtype.bitsize(), "{name}");
            assert!(again.is_ok());
        }
        out.push(0.0);
        assert!(found.read_f32(name, &mut out).is_err());
    }
    Some(found)
}

/// Asks for every value in every way.
fn every_value(meta: &Metadata) {
    fn walk(value: Value) {
        if let Value::Array(array) = value {
            array.iter().flatten().for_each(walk);
        }
    }
    for key in meta.keys() {
        let _ = meta.get(key).map(walk);
        let _ = (meta.u32(key), meta.usize(key), meta.f32(key), meta.bool(key), meta.str(key));
        let _ = (meta.strings(key), meta.f32s(key), meta.i64s(key));
    }
}

fn gguf(bytes: Vec<u8>) {
    let length = bytes.len();
    let opened = watched(length, || Gguf::from_bytes(bytes.into()));
    if let Some(found) = consistent(length, opened) {
        watched(length, || every_value(found.metadata()));
    }
}

fn torch(bytes: Vec<u8>) {
    let length = bytes.len();
    consistent(length, watched(length, || TorchFile::from_bytes(bytes.into())));
}

fn llama2c(bytes: Vec<u8>) {
    let length = bytes.len();
    consistent(length, watched(length, || Llama2c::from_bytes(bytes.into())));
}

fn vocabulary(bytes: Vec<u8>) {
    for count in [0, 3, usize::MAX] {
        let found = watched(bytes.len(), || Vocabulary::from_bytes(&bytes, count));
        if let Ok(found) = found {
            assert_eq!(found.tokens.len(), count);
            let lengths = found.tokens.iter().map(|(_, token)| 8 + token.len());
            assert_eq!(4 + lengths.sum::<usize>(), bytes.len());
        }
    }
}

fn index(bytes: Vec<u8>) {
    if let Ok(found) = watched(bytes.len(), || directory::parse_index(&bytes)) {
        assert!(
            found.values().all(|file| Path::new("d").join(file).parent() == Some(Path::new("d")))
        );
    }
}

fn state_dict(bytes: Vec<u8>) {
    let _ = watched(bytes.len(), || pickle::tensors(&bytes));
}

type Reader = fn(Vec<u8>);

const READERS: [Reader; 6] = [gguf, torch, llama2c, vocabulary, index, state_dict];

/// A llama2.c model of two layers and a vocabulary of three tokens.
fn small_llama2c() -> Vec<u8> {
    let header = [4, 3, 2, 2, 1, 3, 2].into_iter().flat_map(i32::to_le_bytes);
    let floats = 3 * 4 + 2 * (4 + 16 + 8 + 8 + 16 + 4 + 36) + 4 + 2 * 2;
    header.chain((0..floats).flat_map(|i| (i as f32).to_le_bytes())).collect()
}

fn small_vocabulary() -> Vec<u8> {
    let token = |text: &[u8]| [&[0; 4], &(text.len() as i32).to_le_bytes(), text].concat();
    [&[3, 0, 0, 0], &*token(b"a"), &token(b""), &token(b"abc")].concat()
}

/// Valid files, each with its reader.
fn seeds() -> Vec<(Reader, Vec<u8>)> {
    let file = |name: &str| std::fs::read(fixture(name)).unwrap();
    let mut seeds: Vec<(Reader, Vec<u8>)> = vec![
        (gguf, file("types.gguf")),
        (index, file("shards/model.safetensors.index.json")),
        (llama2c, small_llama2c()),
        (vocabulary, small_vocabulary()),
    ];
    for name in ["torch.bin", "torch4.bin", "module.bin"] {
        seeds.push((torch, file(name)));
    }
    seeds
}

/// A change to a file: where (within the whole, the first or the last bytes), and to what.
#[derive(Clone, Debug)]
enum Edit {
    Byte(Place, u8),
    Word(Place, u32),
    Long(Place, u64),
    Remove(Place, usize),
    Repeat(Place, usize),
    Cut(Place),
}

#[derive(Clone, Copy, Debug)]
struct Place(u8, u32);

impl Place {
    fn of(self, length: usize) -> usize {
        let at = self.1 as usize;
        match self.0 {
            0 => at % length,
            1 => at % length.min(2600),
            2 => at % length.min(64),
            _ => length - 1 - at % length.min(1200),
        }
    }
}

impl Edit {
    fn on(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let length = bytes.len();
        let mut put = |place: &Place, new: &[u8]| {
            let at = place.of(length);
            let room = new.len().min(length - at);
            bytes[at..at + room].copy_from_slice(&new[..room]);
        };
        match self {
            Edit::Byte(place, new) => put(place, &[*new]),
            Edit::Word(place, new) => put(place, &new.to_le_bytes()),
            Edit::Long(place, new) => put(place, &new.to_le_bytes()),
            Edit::Remove(place, count) => {
                let at = place.of(length);
                bytes.drain(at..length.min(at + count));
            }
            Edit::Repeat(place, count) => {
                let at = place.of(length);
                let piece = bytes[at..length.min(at + count)].to_vec();
                bytes.splice(at..at, piece);
            }
            Edit::Cut(place) => bytes.truncate(place.of(length)),
        }
    }
}

fn edit() -> impl Strategy<Value = Edit> {
    let place = || (0..4u8, any::<u32>()).prop_map(|(kind, at)| Place(kind, at));
    let byte = prop_oneof![any::<u8>(), prop::sample::select(vec![0, 1, 0x7f, 0x80, 0xff])];
    let word = prop_oneof![any::<u32>(), 0..40u32, (u32::MAX - 8)..=u32::MAX, Just(1 << 31)];
    let long = prop_oneof![
        any::<u64>(),
        0..200u64,
        (u64::MAX - 64)..=u64::MAX,
        (0..64u32).prop_map(|bit| 1 << bit)
    ];
    prop_oneof![
        4 => (place(), byte).prop_map(|(at, new)| Edit::Byte(at, new)),
        3 => (place(), word).prop_map(|(at, new)| Edit::Word(at, new)),
        3 => (place(), long).prop_map(|(at, new)| Edit::Long(at, new)),
        1 => (place(), 1..40usize).prop_map(|(at, count)| Edit::Remove(at, count)),
        1 => (place(), 1..200usize).prop_map(|(at, count)| Edit::Repeat(at, count)),
        1 => place().prop_map(Edit::Cut),
    ]
}

/// Pieces of pickles, good and bad.
fn opcodes() -> impl Strategy<Value = Vec<u8>> {
    let word = prop::sample::select(vec![
        &b"\x80\x02"[..],
        b"}",
        b"]",
        b")",
        b"(",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"N",
        b"\x88",
        b"K\x01",
        b"J\xff\xff\xff\xff",
        b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"U\x01a",
        b"X\x05\0\0\0model",
        b"X\xff\xff\xff\xff",
        b"q\x00",
        b"q\x01",
        b"h\x00",
        b"h\x01",
        b"\x94",
        b"0",
        b"1",
        b"2",
        b"a",
        b"e",
        b"s",
        b"u",
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x06tQ",
        b"R",
        b"b",
        b"Q",
        b".",
    ]);
    prop::collection::vec(word, 0..60).prop_map(|words| words.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_files_are_read_or_refused(edits in prop::collection::vec(edit(), 1..6)) {
        for (reader, mut bytes) in seeds() {
            edits.iter().for_each(|edit| edit.on(&mut bytes));
            reader(bytes);
        }
    }

    #[test]
    fn any_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        for reader in READERS {
            reader(bytes.clone());
        }
        gguf([&b"GGUF\x03\0\0\0"[..], &bytes].concat());
    }

    #[test]
    fn any_opcodes_are_run_or_refused(bytes in opcodes()) {
        state_dict(bytes);
    }
}

#[test]
fn files_that_are_cut_short_are_refused() {
    for (reader, bytes) in seeds() {
        reader(bytes.clone());
        for length in (0..bytes.len()).step_by(7) {
            reader(bytes[..length].to_vec());
        }
    }
    let whole = std::fs::read(fixture("types.gguf")).unwrap();
    let cut = whole[..whole.len() - 32].to_vec();
    let text = Gguf::from_bytes(cut.into()).err().unwrap().to_string();
    assert!(text.contains("tensor `I32`") && text.contains("cut short"), "{text}");
    let whole = std::fs::read(fixture("torch.bin")).unwrap();
    for length in 0..whole.len() {
        assert!(TorchFile::from_bytes(whole[..length].to_vec().into()).is_err(), "{length}");
    }
}
