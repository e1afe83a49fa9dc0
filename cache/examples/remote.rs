//! How fast an artifact goes to a remote and comes back, beside a bare client in the same run.
//!
//! ```text
//! remote URL MIB        the environment has the credentials (AWS_ENDPOINT_URL and so on)
//! ```
//!
//! The bare client is `object_store` by itself: parts of 8 MiB, eight at once, out of a file; and
//! one stream into a file. Both read back what they wrote; neither keeps a journal, hashes or syncs.
//! Rounds alternate, since a store gets slower or faster as it fills.

use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use cache::remote::{Progress, Remote, Settings, Trust, artifacts};
use cache::{Cache, Entry, Finished, Publication};
use futures_util::StreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::path::Path as Name;
use object_store::{ObjectStore, ObjectStoreExt, WriteMultipart};

const ROUNDS: u32 = 2;

type Done<T> = Result<T, Box<dyn Error>>;

fn main() -> Done<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, mib] = &arguments[..] else { return Err("usage: remote URL MIB".into()) };
    let bytes = mib.parse::<u64>()? << 20;
    let dir = tempfile::tempdir()?;
    // As a remote does when it is opened; the bare client finds no other.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut best = [[0f64; 2]; 2];
    for round in 0..ROUNDS {
        let file = dir.path().join(format!("{round}"));
        random_file(&file, bytes, round.into())?;
        let bare = runtime.block_on(bare(url, &file, round))?;
        let ours = ours(url, &file, dir.path(), round)?;
        for (best, now) in best.iter_mut().zip([ours, bare]) {
            for (best, seconds) in best.iter_mut().zip(now) {
                *best = best.max(mib.parse::<f64>()? / seconds);
            }
        }
        fs::remove_file(&file).or_else(|e| if file.exists() { Err(e) } else { Ok(()) })?;
        let rate = |s: f64| mib.parse::<f64>().unwrap_or(0.0) / s;
        say(&format!(
            "round {round}: push {:.0} MiB/s, bare {:.0}; pull {:.0} MiB/s, bare {:.0}",
            rate(ours[0]),
            rate(bare[0]),
            rate(ours[1]),
            rate(bare[1])
        ))?;
    }
    let [ours, bare] = best;
    say(&format!(
        "best of {ROUNDS}: push {:.0} of {:.0} MiB/s ({:.0} %), pull {:.0} of {:.0} MiB/s ({:.0} %)",
        ours[0],
        bare[0],
        100.0 * ours[0] / bare[0],
        ours[1],
        bare[1],
        100.0 * ours[1] / bare[1],
    ))
}

fn say(line: &str) -> Done<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

/// Bytes that nobody can pack, and others in every round.
fn random_file(path: &Path, bytes: u64, seed: u64) -> Done<()> {
    let mut file = File::create(path)?;
    let time = std::time::UNIX_EPOCH.elapsed()?.as_nanos() as u64;
    let mut x = time ^ seed << 56 | 1;
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..bytes >> 20 {
        for word in buffer.chunks_exact_mut(8) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            word.copy_from_slice(&x.to_le_bytes());
        }
        file.write_all(&buffer)?;
    }
    Ok(file.sync_all()?)
}

/// Seconds of a push and of a pull into an empty cache.
fn ours(url: &str, file: &Path, dir: &Path, round: u32) -> Done<[f64; 2]> {
    let caches = ["from", "to"].map(|name| Cache::open(dir.join(format!("{name}{round}"))));
    let [from, to] = caches;
    let (from, to) = (from?, to?);
    let entry = publish(&from, file, round)?;
    let mut settings = Settings::new(url);
    settings.trust = Trust::Writers;
    let open = || Remote::open(settings.clone(), &|name| std::env::var_os(name));
    let (cancel, progress) = (AtomicBool::new(false), Progress::new());
    let start = Instant::now();
    open()?.push(&from, &entry, &progress, &cancel)?;
    let push = start.elapsed().as_secs_f64();
    let start = Instant::now();
    open()?.fetch(&to, &artifacts(&entry), &progress, &cancel)?;
    let pull = start.elapsed().as_secs_f64();
    to.verify(&entry.outputs[0])?;
    for cache in [from, to] {
        let _ = fs::remove_dir_all(cache.root().join("objects"));
    }
    Ok([push, pull])
}

fn publish(cache: &Cache, file: &Path, round: u32) -> Done<Entry> {
    let preimage = format!("{{\"bench\":{round}}}");
    let attempt = cache.attempt(&cache::Key::of(preimage.as_bytes()))?;
    let path = attempt.dir.join("file");
    fs::copy(file, &path)?;
    let outputs = vec![attempt.absorb("file", None, "file", &path)?];
    let provenance = serde_json::json!({ "stage": "bench" });
    attempt.finish(&Finished {
        outputs: outputs.clone(),
        log: None,
        provenance: provenance.clone(),
    })?;
    let entry = Entry::new(preimage, outputs, None, provenance);
    let committer = cache.committer(|_| {});
    let (key, claim, attempt, replace) = (entry.key, None, None, false);
    committer.publish(Publication { key, entry: entry.clone(), claim, attempt, replace })?;
    committer.flush()?;
    Ok(entry)
}

/// Seconds of an upload and of a download by the library alone.
async fn bare(url: &str, file: &Path, round: u32) -> Done<[f64; 2]> {
    let (bucket, prefix) =
        url.strip_prefix("s3://").and_then(|u| u.split_once('/')).ok_or("an s3 URL")?;
    let store = AmazonS3Builder::from_env().with_bucket_name(bucket).build()?;
    let name = Name::from(format!("{prefix}/bare/{round}"));
    let start = Instant::now();
    let upload = store.put_multipart(&name).await?;
    let mut upload = WriteMultipart::new_with_chunk_size(upload, 8 << 20);
    let mut from = File::open(file)?;
    let mut buffer = vec![0; 8 << 20];
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        upload.wait_for_capacity(8).await?;
        upload.write(&buffer[..n]);
    }
    upload.finish().await?;
    let push = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let to = file.with_extension("bare");
    let mut out = File::create(&to)?;
    let mut stream = store.get_opts(&name, Default::default()).await?.into_stream();
    while let Some(piece) = stream.next().await {
        out.write_all(&piece?)?;
    }
    let pull = start.elapsed().as_secs_f64();
    fs::remove_file(to)?;
    store.delete(&name).await?;
    Ok([push, pull])
}
