//! What a run does beside the work of its steps, part by part, at 1,000 and 10,000 steps.
//!
//! ```text
//! cargo bench -p engine --bench parts            # all
//! cargo bench -p engine --bench parts -- plan    # those with `plan` in their names
//! ```
//!
//! Numbers to compare before and after a change on one machine; nothing is promised by them.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use cache::{Cache, Entry as Made, Hit, Key, Kind, Output, Publication};
use divan::{Bencher, black_box};
use engine::command::Command;
use engine::lookup::{self, Inputs};
use engine::plan::{Plan, kept};
use engine::schedule::{self, Need, Schedule, Slots};
use engine::spec::{self, Options};
use engine::stage::{Entry, Registry};
use tempfile::TempDir;

const REGISTRY: Registry = Registry(&[Entry::of::<Command>()]);
const SIZES: [usize; 2] = [1_000, 10_000];

fn main() {
    divan::main();
}

/// Steps of a matrix, each with a file of its own.
fn matrix(steps: usize) -> String {
    format!(
        "name: bench\nsteps:\n  s: {{ matrix: {{ i: 0..{steps} }}, in: {{ src: './in/${{matrix.i}}.txt' }}, \
         stage: command, run: ': ${{matrix.i}}; cat ${{in.src}} > ${{out.out}}', out: {{ out: out.txt }} }}\n"
    )
}

/// The same steps, each written out.
fn written(steps: usize) -> String {
    let step = |i: usize| {
        format!(
            "  s{i}:\n    stage: command\n    in: {{ src: ./in/{i}.txt }}\n    \
             run: ': {i}; cat ${{in.src}} > ${{out.out}}'\n    out: {{ out: out.txt }}\n"
        )
    };
    format!("name: bench\nsteps:\n{}", (0..steps).map(step).collect::<String>())
}

/// A project with so many files, and an empty cache.
struct Place {
    dir: TempDir,
    cache: Cache,
}

impl Place {
    fn new(files: usize) -> Place {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("in")).unwrap();
        for i in 0..files {
            fs::write(dir.path().join(format!("in/{i}.txt")), format!("input {i}\n")).unwrap();
        }
        let cache = Cache::open(dir.path().join("cache")).unwrap();
        Place { dir, cache }
    }

    fn plan(&self, text: &str) -> Arc<Plan> {
        let options = Options { cwd: self.dir.path().to_path_buf(), ..Options::default() };
        spec::load_text("p.yaml", text, &options, &REGISTRY).unwrap().plan
    }
}

#[divan::bench(args = SIZES)]
fn plan_matrix(bencher: Bencher, steps: usize) {
    let (place, text) = (Place::new(steps), matrix(steps));
    bencher.bench_local(|| place.plan(black_box(&text)));
}

#[divan::bench(args = SIZES)]
fn plan_written(bencher: Bencher, steps: usize) {
    let (place, text) = (Place::new(steps), written(steps));
    bencher.bench_local(|| place.plan(black_box(&text)));
}

#[divan::bench(args = SIZES)]
fn plan_kept(bencher: Bencher, steps: usize) {
    let place = Place::new(steps);
    let bytes = kept::render(&place.plan(&matrix(steps)));
    bencher.bench_local(|| kept::parse(black_box(&bytes)).unwrap());
}

#[divan::bench(args = SIZES)]
fn keys(bencher: Bencher, steps: usize) {
    let place = Place::new(steps);
    let plan = place.plan(&matrix(steps));
    let all: Vec<usize> = (0..steps).collect();
    let files = lookup::user_files(&plan, &all, &place.cache);
    let inputs = Inputs { plan: &plan, files: &files, hub: &BTreeMap::new(), outputs: &|_| None };
    let key = |step| lookup::pre_image(&inputs, step, REGISTRY).unwrap().key();
    bencher.bench_local(|| all.iter().map(|&step| key(step)).collect::<Vec<Key>>());
}

#[divan::bench(args = SIZES)]
fn schedule_chain(bencher: Bencher, steps: usize) {
    let need = |i: usize| Need { after: i.checked_sub(1).into_iter().collect(), ..need() };
    play(bencher, (0..steps).map(need).collect());
}

#[divan::bench(args = SIZES)]
fn schedule_wide(bencher: Bencher, steps: usize) {
    play(bencher, vec![need(); steps]);
}

fn need() -> Need {
    Need { after: Vec::new(), slots: Slots { cpu: 1, gpu: 0, memory: 0 }, cost: 1.0 }
}

/// Every step is looked up and launched.
fn play(bencher: Bencher, needs: Vec<Need>) {
    bencher.bench_local(|| {
        let pool = Slots { cpu: 2, gpu: 0, memory: 0 };
        let mut schedule = Schedule::new(black_box(&needs), pool, false);
        while let Some(command) = schedule.next_command() {
            match command {
                schedule::Command::Look(step) => schedule.miss(step),
                schedule::Command::Launch(step) => schedule.done(step),
            }
        }
        assert!(schedule.finished());
    });
}

/// Results of a few bytes, published and durable; their keys.
fn publish(cache: &Cache, count: usize) -> Vec<Key> {
    let committer = cache.committer(|_| {});
    let mut keys = Vec::with_capacity(count);
    for i in 0..count {
        let output = Output {
            port: "out".into(),
            index: None,
            name: "out.txt".into(),
            kind: Kind::File,
            digest: cache::Digest::of(&i.to_le_bytes()),
            bytes: 8,
        };
        let entry = Made::new(format!("{{\"i\":{i}}}"), vec![output], None, "".into());
        keys.push(entry.key);
        committer.publish(Publication::imported(entry)).unwrap();
    }
    committer.flush().unwrap();
    keys
}

#[divan::bench(args = [1_000])]
fn publish_entries(bencher: Bencher, count: usize) {
    let place = || Place::new(0);
    bencher.with_inputs(place).bench_local_values(|place| {
        publish(&place.cache, count);
        place
    });
}

#[divan::bench(args = SIZES)]
fn lookup_entries(bencher: Bencher, count: usize) {
    let place = Place::new(0);
    let keys = publish(&place.cache, count);
    bencher.bench_local(|| {
        keys.iter().filter(|key| place.cache.lookup(key).unwrap().is_some()).count()
    });
}

#[divan::bench(args = SIZES)]
fn lookup_memo(bencher: Bencher, count: usize) {
    let place = Place::new(0);
    let keys = publish(&place.cache, count);
    let mut memo = place.cache.memo();
    for key in &keys {
        let (entry, stamp) = place.cache.lookup_stamped(key).unwrap().unwrap();
        memo.hit(*key, stamp.unwrap(), &Hit::of(&entry));
    }
    memo.write(&place.cache, "memo-bench", b"", &keys, None).unwrap();
    bencher.bench_local(|| {
        let recalled = place.cache.recall("memo-bench").unwrap();
        keys.iter().filter(|key| recalled.hit(key).is_some()).count()
    });
}

#[divan::bench(args = SIZES)]
fn hash_small_files(bencher: Bencher, files: usize) {
    let place = Place::new(files);
    let plan = place.plan(&matrix(files));
    let all: Vec<usize> = (0..files).collect();
    bencher.bench_local(|| lookup::user_files(&plan, &all, &place.cache));
}

#[divan::bench(args = [1 << 20, 64 << 20])]
fn hash_one_file(bencher: Bencher, bytes: usize) {
    let place = Place::new(0);
    let path: OnceCell<PathBuf> = OnceCell::new();
    let path = path.get_or_init(|| {
        let path = place.dir.path().join("big");
        fs::write(&path, vec![7; bytes]).unwrap();
        path
    });
    let count = divan::counter::BytesCount::new(bytes);
    bencher.counter(count).bench_local(|| cache::hash_file(black_box(path)).unwrap());
}
