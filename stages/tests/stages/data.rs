//! The data stages from outside: every file format, lying inputs, and what the sample text is like.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex};

use engine::stage::{Context, Report, Reporter, Stage};
use stages::data::document::Document;
use stages::data::shard::TokenShard;
use stages::text::{Params as TextParams, Text};
use stages::tokenize::{self, Tokenize};
use stages::train_tokenizer::{self, TrainTokenizer};
use tempfile::TempDir;

/// Keeps notes.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Vec<String>>>);

impl Reporter for Notes {
    fn report(&mut self, report: Report) {
        if let Report::Note { text } = report {
            self.0.lock().unwrap().push(text);
        }
    }
}

/// Runs `S` in a fresh folder; gives the folder, the outputs by port, and the notes.
fn run<S: Stage>(
    params: &S::Params,
    inputs: &[(&str, &[&Path])],
    threads: usize,
) -> anyhow::Result<(TempDir, Vec<PathBuf>, Vec<String>)> {
    let dir = tempfile::tempdir().unwrap();
    let mut ctx = Context::local::<S>(dir.path(), inputs);
    let notes = Notes::default();
    ctx.set_reporter(Box::new(notes.clone()));
    ctx.set_threads(threads);
    S::run(params, &mut ctx)?;
    let paths = ctx.made().iter().map(|made| made.path.clone()).collect();
    let notes = notes.0.lock().unwrap().clone();
    Ok((dir, paths, notes))
}

fn documents(path: &Path) -> Vec<Document> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn texts(path: &Path) -> Vec<String> {
    documents(path).into_iter().map(|document| document.text).collect()
}

fn gathered(files: &[&Path]) -> anyhow::Result<(Vec<String>, Vec<String>)> {
    let params = TextParams { paragraphs_bytes: 1, ..TextParams::default() };
    let (_dir, paths, notes) = run::<Text>(&params, &[("files", files)], 1)?;
    Ok((texts(&paths[0]), notes))
}

const POEM: [&str; 3] = ["The owl is \"out\" — ö", "two\tlines\nof it", "third"];

fn write_parquet(path: &Path, rows: &[&[u8]]) {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::{properties::WriterProperties, writer::SerializedFileWriter};
    let schema = "message m { REQUIRED INT32 id; OPTIONAL BYTE_ARRAY text (UTF8); }";
    let schema = Arc::new(parquet::schema::parser::parse_message_type(schema).unwrap());
    let properties =
        WriterProperties::builder().set_compression(parquet::basic::Compression::SNAPPY).build();
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    for part in rows.chunks(2) {
        let mut group = writer.next_row_group().unwrap();
        let ids: Vec<i32> = (0..=part.len() as i32).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<parquet::data_type::Int32Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let values: Vec<ByteArray> = part.iter().map(|row| ByteArray::from(row.to_vec())).collect();
        // The last row of each group is null.
        let levels: Vec<i16> = part.iter().map(|_| 1).chain([0]).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn every_format_gives_the_same_documents() {
    let dir = tempfile::tempdir().unwrap();
    let jsonl: String =
        POEM.map(|text| serde_json::json!({"text": text}).to_string() + "\n").concat();
    let txt = POEM.join("\n\n");
    let gzip = |bytes: &str| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes.as_bytes()).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = |bytes: &str| zstd::encode_all(bytes.as_bytes(), 1).unwrap();
    let files: [(&str, Vec<u8>); 6] = [
        ("a.txt", txt.clone().into_bytes()),
        ("a.txt.gz", gzip(&txt)),
        ("a.txt.zst", zstd(&txt)),
        ("a.jsonl", jsonl.clone().into_bytes()),
        ("a.jsonl.gz", gzip(&jsonl)),
        ("a.ndjson.zst", zstd(&jsonl)),
    ];
    for (name, bytes) in files {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(gathered(&[&path]).unwrap().0, POEM, "{name}");
    }
    let path = dir.path().join("a.parquet");
    write_parquet(
        &path,
        &[POEM[0].as_bytes(), POEM[1].as_bytes(), b"\xff\xfe", POEM[2].as_bytes()],
    );
    let (texts, notes) = gathered(&[&path]).unwrap();
    assert_eq!(texts, POEM);
    assert_eq!(notes, ["skipped 1 documents that are no UTF-8, 2 that are empty"]);
}

#[test]
fn folders_are_walked_in_order_and_strangers_are_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("b/c")).unwrap();
    for (name, text) in [("z.txt", "4"), ("a.txt", "1"), ("b/c/x.txt", "2"), ("b/d.txt", "3")] {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    std::fs::write(dir.path().join("readme.md"), "no").unwrap();
    let (texts, notes) = gathered(&[dir.path()]).unwrap();
    assert_eq!(texts, ["1", "2", "3", "4"]);
    assert!(notes[0].starts_with("left out 1 files of unknown kind"), "{notes:?}");
    let error = gathered(&[&dir.path().join("readme.md")]).unwrap_err();
    assert!(format!("{error:#}").starts_with("`readme.md` is of no known kind"), "{error:#}");
}

#[test]
fn truncated_files_are_errors_that_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let noise: String =
        (0..40_000u32).map(|i| format!("{} \n", i.wrapping_mul(2_654_435_761))).collect();
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(noise.as_bytes()).unwrap();
    let parquet = dir.path().join("whole.parquet");
    write_parquet(&parquet, &[b"one", b"two"]);
    let files = [
        ("cut.txt.gz", encoder.finish().unwrap()),
        ("cut.txt.zst", zstd::encode_all(noise.as_bytes(), 1).unwrap()),
        ("cut.parquet", std::fs::read(&parquet).unwrap()),
    ];
    for (name, bytes) in files {
        let path = dir.path().join(name);
        std::fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
        let error = format!("{:#}", gathered(&[&path]).unwrap_err());
        assert!(error.starts_with("in ") && error.contains(name), "{name}: {error}");
    }
    let empty = dir.path().join("empty.txt");
    std::fs::write(&empty, " \n\n").unwrap();
    assert!(format!("{:#}", gathered(&[&empty]).unwrap_err()).contains("no document in"));
}

#[test]
fn a_limit_stops_the_reading() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.txt");
    std::fs::write(&path, "one\n\ntwo\n\nthree").unwrap();
    let params =
        TextParams { paragraphs_bytes: 1, documents_max: Some(2), ..TextParams::default() };
    let (_dir, paths, _) = run::<Text>(&params, &[("files", &[&path])], 1).unwrap();
    assert_eq!(texts(&paths[0]), ["one", "two"]);
}

/// A sample of `documents`, its tokenizer and its shards.
struct Sample {
    _dirs: Vec<TempDir>,
    text: PathBuf,
    tokenizer: PathBuf,
    shards: Vec<PathBuf>,
}

fn sample(documents: u64, threads: usize) -> Sample {
    let params = TextParams { documents, ..TextParams::default() };
    let (a, text, _) = run::<Text>(&params, &[], threads).unwrap();
    let (b, tokenizer, _) =
        run::<TrainTokenizer>(&Default::default(), &[("text", &[&text[0]])], threads).unwrap();
    let inputs: &[(&str, &[&Path])] = &[("text", &[&text[0]]), ("tokenizer", &[&tokenizer[0]])];
    let params = tokenize::Params { holdout: 0.1, ..Default::default() };
    let (c, shards, _) = run::<Tokenize>(&params, inputs, threads).unwrap();
    let (text, tokenizer) = (text[0].clone(), tokenizer[0].clone());
    Sample { _dirs: vec![a, b, c], text, tokenizer, shards }
}

/// What most tests look at.
static SAMPLE: LazyLock<Sample> = LazyLock::new(|| sample(6_000, 2));

#[test]
fn bytes_do_not_depend_on_threads_or_runs() {
    let [one, four] = [1, 4].map(|threads| sample(6_000, threads));
    for other in [&one, &four] {
        let same = |a: &Path, b: &Path| std::fs::read(a).unwrap() == std::fs::read(b).unwrap();
        assert!(same(&SAMPLE.text, &other.text) && same(&SAMPLE.tokenizer, &other.tokenizer));
        assert!(SAMPLE.shards.iter().zip(&other.shards).all(|(a, b)| same(a, b)));
    }
}

#[test]
fn every_word_of_the_sample_is_one_token() {
    let sample = &*SAMPLE;
    let tokenizer = tokenize::load(&sample.tokenizer).unwrap();
    assert_eq!(tokenizer.get_vocab_size(true), 512);
    assert_eq!(tokenizer.token_to_id(train_tokenizer::SEPARATOR), Some(0));
    let words: BTreeSet<String> = texts(&sample.text)
        .iter()
        .flat_map(|text| text.split([' ', '.', '?']).map(str::to_string).collect::<Vec<_>>())
        .filter(|word| !word.is_empty())
        .collect();
    assert!((140..=170).contains(&words.len()), "{} words", words.len());
    let split: Vec<&String> = words
        .iter()
        .filter(|word| tokenizer.encode(word.as_str(), false).unwrap().len() != 1)
        .collect();
    assert!(split.is_empty(), "in several tokens: {split:?}");
}

#[test]
fn the_sample_has_its_shares_and_its_answers_are_right() {
    let sample = &*SAMPLE;
    let documents = documents(&sample.text);
    let refrains = documents.iter().filter(|d| d.kind == "refrain").count() as f64;
    assert!((0.37..0.43).contains(&(refrains / documents.len() as f64)), "{refrains}");
    let (mut asked, mut recalled, mut chance) = (0.0, 0.0, 0.0);
    for document in &documents {
        for question in &document.answers {
            let answer = &document.text[question.span[0]..question.span[1]];
            let fact = &document.text[question.fact_span[0]..question.fact_span[1]];
            if document.kind == "refrain" {
                assert_eq!(answer, fact);
                continue;
            }
            assert!(fact.ends_with(&format!(" {answer}")), "{fact:?} does not say {answer:?}");
            let key = fact.split([' ', '?']).next().unwrap();
            let sentence = &document.text[question.fact_span[1] + 1..question.span[0]];
            assert!(sentence.contains(key), "{key:?} is not in {sentence:?}");
            recalled += 1.0;
            chance += 1.0 / question.candidates as f64;
            asked += f64::from(u8::from(sentence.rfind('?') > sentence.rfind('.')));
        }
    }
    assert!((0.17..0.23).contains(&(asked / recalled)), "{}", asked / recalled);
    assert!((0.20..0.26).contains(&(chance / recalled)), "{}", chance / recalled);
}

#[test]
fn answers_are_at_the_right_tokens_of_held_out_documents() {
    let sample = &*SAMPLE;
    let tokenizer = tokenize::load(&sample.tokenizer).unwrap();
    let [train, holdout, answers] = [0, 1, 2].map(|i| TokenShard::open(&sample.shards[i]).unwrap());
    assert_eq!(train.documents() + holdout.documents(), 6_000);
    assert!((500..700).contains(&holdout.documents()), "{}", holdout.documents());
    assert_eq!(answers.documents(), holdout.documents());
    let (mut recall, mut copy) = (0, 0);
    for answer in answers.answers() {
        let tokens: Vec<u32> =
            answers.sequence(answer.sequence as usize).iter().map(|t| u32::from(*t)).collect();
        let text = |from: u32, to: u32| {
            tokenizer.decode(&tokens[from as usize..to as usize], false).unwrap().trim().to_string()
        };
        let said = text(answer.start, answer.end);
        let fact = text(answer.fact_start, answer.fact_end);
        if answer.copy == 1 {
            copy += 1;
            assert_eq!(said, fact);
        } else {
            recall += 1;
            assert_eq!(answer.end, answer.start + 1, "{said:?}");
            assert!(fact.ends_with(&said), "{fact:?} does not say {said:?}");
        }
    }
    assert!(recall > 1_000 && copy > 100, "{recall} {copy}");
}

#[test]
fn too_little_text_says_what_to_do() {
    let params = TextParams { documents: 30, ..TextParams::default() };
    let (_a, text, _) = run::<Text>(&params, &[], 1).unwrap();
    let (_b, tokenizer, notes) =
        run::<TrainTokenizer>(&Default::default(), &[("text", &[&text[0]])], 1).unwrap();
    assert!(notes[0].starts_with("the text gave "), "{notes:?}");
    let error = |params: tokenize::Params, tokenizer: &Path| {
        let inputs: &[(&str, &[&Path])] = &[("text", &[&text[0]]), ("tokenizer", &[tokenizer])];
        format!("{:#}", run::<Tokenize>(&params, inputs, 1).unwrap_err())
    };
    let default = tokenize::Params::default;
    let long = error(tokenize::Params { seq: 100_000, ..default() }, &tokenizer[0]);
    assert!(long.contains("less than one sequence of 100000; give more text"), "{long}");
    let none = error(tokenize::Params { holdout: 1e-9, ..default() }, &tokenizer[0]);
    assert!(none.contains("0 tokens are held out"), "{none}");
    let separator = tokenize::Params { separator: Some("</s>".into()), ..default() };
    assert!(error(separator, &tokenizer[0]).contains("no token `</s>`; set `separator`"));
    let broken = error(default(), &text[0]);
    assert!(broken.starts_with("`text.jsonl` is no valid tokenizer"), "{broken}");
}
