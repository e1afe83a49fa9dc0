//! The index: fast while it is right, harmless when it is gone, damaged or wrong.

use std::fs;

use cache::{Cache, Entry};

use crate::support::*;

fn filled() -> (Home, Vec<Entry>) {
    let home = Home::new();
    let entries = (0..5).map(|i| put(&home.cache, &format!("s{i}"), &format!("b{i}")).0).collect();
    (home, entries)
}

fn check(cache: &Cache, entries: &[Entry]) {
    let reader = cache.reader();
    for entry in entries {
        assert_eq!(reader.lookup(&entry.key).unwrap().as_ref(), Some(entry));
        assert_eq!(cache.lookup(&entry.key).unwrap().as_ref(), Some(entry));
    }
    let mut sorted = entries.to_vec();
    sorted.sort_by_key(|e| e.key);
    assert_eq!(cache.entries().unwrap().collect::<Vec<_>>(), sorted);
    let recent = cache.recent("toy", "s1", 3);
    let steps: Vec<_> = recent.iter().map(|e| e.provenance["step"].as_str().unwrap()).collect();
    assert_eq!(steps, ["s1", "s4", "s3"]);
    assert!(cache.recent("other", "s1", 3).is_empty());
}

#[test]
fn deleted_before_or_while_open() {
    let (Home { dir, cache }, entries) = filled();
    check(&cache, &entries);
    drop_index(cache.root());
    check(&cache, &entries);
    let root = cache.root().to_path_buf();
    drop(cache);
    drop_index(&root);
    for _ in 0..2 {
        check(&Cache::open(&root).unwrap(), &entries);
    }
    drop(dir);
}

#[test]
fn damaged_in_every_way() {
    for damage in ["text", "zero", "cut", "schema", "dir"] {
        let (Home { dir, cache }, entries) = filled();
        let root = cache.root().to_path_buf();
        drop(cache);
        for item in fs::read_dir(root.join("index")).unwrap() {
            let path = item.unwrap().path();
            // Closing a plain connection, below, removes the files beside the database.
            let Ok(meta) = fs::metadata(&path) else { continue };
            let size = meta.len() as usize;
            match damage {
                "text" => fs::write(&path, "this is not a database, it is a text".repeat(200)),
                "zero" => fs::write(&path, vec![0; size]),
                "cut" => fs::write(&path, &fs::read(&path).unwrap()[..size / 2]),
                "schema" if path.extension().is_some_and(|e| e == "sqlite") => {
                    let other = rusqlite::Connection::open(&path).unwrap();
                    other.execute_batch("DROP TABLE entries; CREATE TABLE entries (x);").unwrap();
                    Ok(())
                }
                "dir" => fs::remove_file(&path).and_then(|()| fs::create_dir(&path)),
                _ => Ok(()),
            }
            .unwrap();
        }
        for _ in 0..3 {
            check(&Cache::open(&root).unwrap(), &entries);
        }
        drop(dir);
    }
}

#[test]
fn a_row_without_its_file_or_with_another_text_is_not_believed() {
    let (home, entries) = filled();
    let reader = home.cache.reader();
    let name = entries[0].key.to_string();
    let path = home.root().join("entries").join(&name[..2]).join(&name);
    let text = fs::read(&path).unwrap();
    let created = fs::metadata(&path).unwrap().modified().unwrap();
    fs::remove_file(&path).unwrap();
    assert!(reader.lookup(&entries[0].key).unwrap().is_none(), "removed by hand");
    assert!(home.cache.recent("toy", "s0", 9).iter().all(|e| e.key != entries[0].key));
    fs::write(&path, &text).unwrap();
    fs::File::open(&path).unwrap().set_modified(created).unwrap();
    assert_eq!(reader.lookup(&entries[0].key).unwrap().as_ref(), Some(&entries[0]), "put back");

    let mut all = fs::read_dir(home.cache.index_dir()).unwrap().map(|i| i.unwrap().path());
    let file = all.find(|p| p.extension().is_some_and(|e| e == "sqlite")).unwrap();
    let rows = rusqlite::Connection::open(file).unwrap();
    rows.execute("UPDATE entries SET text = replace(text, 'model', 'nodel')", []).unwrap();
    drop(rows);
    check(&home.reopened(), &entries);
}

#[test]
fn uses_are_known() {
    let (home, entries) = filled();
    let uses = home.cache.uses();
    assert_eq!(uses.len(), entries.len());
    assert!(uses.iter().all(|(_, used, seconds)| *used > 1_600_000_000 && *seconds == 1.5));
}
