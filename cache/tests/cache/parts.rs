//! Files of tensors: kept in parts that others share, and the very same bytes again.

use std::fs;

use cache::{Cache, Digest, Error, Output};

use crate::support::*;

/// Absorbs a file of tensors.
fn absorb(cache: &Cache, bytes: &[u8]) -> Output {
    let attempt = cache.attempt(&key("tensors")).unwrap();
    let path = attempt.dir.join("m.safetensors");
    fs::write(&path, bytes).unwrap();
    let output = attempt.absorb("model", None, "m.safetensors", &path).unwrap();
    assert!(!path.exists());
    output
}

fn whole(home: &Home, output: &Output) -> Vec<u8> {
    let to = home.dir.path().join("whole");
    let _ = fs::remove_file(&to);
    fs::read(home.cache.whole(output, || to).unwrap()).unwrap()
}

#[test]
fn equal_tensors_are_stored_once_and_the_bytes_come_back() {
    let home = Home::new();
    let (first, second) = (tensors(1, 9), tensors(2, 9));
    let (a, b) = (absorb(&home.cache, &first), absorb(&home.cache, &second));
    assert_eq!((a.digest, a.bytes), (Digest::of(&first), first.len() as u64));
    for (output, bytes) in [(&a, &first), (&b, &second)] {
        assert!(!home.cache.object(&output.digest).exists());
        assert!(home.cache.present(output));
        home.cache.verify(output).unwrap();
        home.cache.check(output).unwrap();
        assert_eq!(whole(&home, output), *bytes);
    }
    let parts = |o: &Output| -> Vec<Digest> {
        home.cache.recipe(&o.digest).unwrap().parts().map(|p| p.digest).collect()
    };
    let (a, b) = (parts(&a), parts(&b));
    assert_eq!((a.len(), b.len()), (4, 4), "header and three tensors");
    let shared: Vec<_> = a.iter().filter(|part| b.contains(part)).collect();
    assert_eq!(shared, [&a[0], &a[2]], "the header is the same text, and so is the middle tensor");
}

#[test]
fn what_is_no_file_of_tensors_stays_whole() {
    let home = Home::new();
    let good = tensors(1, 2);
    let mut wrong = vec![good[..good.len() - 1].to_vec(), [&good[..], b"x"].concat()];
    let mut overlapping = good.clone();
    let at = overlapping.windows(7).position(|w| w == b"[20000,").unwrap();
    overlapping[at + 1] = b'1';
    let mut header = good.clone();
    header[0] ^= 0x80;
    wrong.extend([overlapping, header, vec![0; 70_000], vec![0xff; 70_000], Vec::new()]);
    for bytes in wrong {
        let output = absorb(&home.cache, &bytes);
        assert!(home.cache.recipe(&output.digest).is_none());
        assert_eq!(read_bytes(&home.cache, &output), bytes);
    }
}

fn read_bytes(cache: &Cache, output: &Output) -> Vec<u8> {
    fs::read(cache.object(&output.digest)).unwrap()
}

#[test]
fn a_part_lost_or_damaged_is_found_made_anew_and_others_keep_theirs() {
    let home = Home::new();
    let bytes = tensors(1, 9);
    let (a, b) = (absorb(&home.cache, &bytes), absorb(&home.cache, &tensors(2, 9)));
    let recipe = home.cache.recipe(&a.digest).unwrap();
    let parts: Vec<Digest> = recipe.parts().map(|part| part.digest).collect();

    lose(&home.cache, &parts[1]);
    assert!(!home.cache.present(&a) && home.cache.present(&b));
    assert!(matches!(home.cache.check(&a), Err(Error::Missing { .. })));
    assert_eq!(absorb(&home.cache, &bytes), a);
    home.cache.check(&a).unwrap();

    let part = home.cache.object(&parts[2]);
    let mut flipped = fs::read(&part).unwrap();
    flipped[17] ^= 4;
    scribble(&part, &flipped);
    assert!(home.cache.present(&a), "its size is right");
    assert!(matches!(home.cache.check(&a), Err(Error::Damaged { .. })));
    assert!(matches!(home.cache.verify(&b), Err(Error::Damaged { .. })), "both share it");
    home.cache.discard(&a).unwrap();
    assert!(!part.exists() && home.cache.object(&parts[1]).exists(), "only what is wrong goes");
    assert_eq!(absorb(&home.cache, &bytes), a);
    home.cache.verify(&a).unwrap();
    home.cache.verify(&b).unwrap();
}

#[test]
fn a_damaged_recipe_counts_for_nothing_and_is_replaced() {
    let home = Home::new();
    let bytes = tensors(1, 9);
    let a = absorb(&home.cache, &bytes);
    let path = home.cache.path(&a.digest);
    let text = fs::read_to_string(&path).unwrap();
    scribble(&path, text.replace("\"bytes\":", "\"bytes\": ").as_bytes());
    assert!(!home.cache.present(&a));
    assert!(home.cache.verify(&a).is_err() && home.cache.check(&a).is_err());
    assert_eq!(absorb(&home.cache, &bytes), a);
    home.cache.verify(&a).unwrap();
}

#[test]
fn the_check_before_use_reads_only_what_may_have_changed() {
    let home = Home::new();
    let output = absorb(&home.cache, b"plain text");
    std::thread::sleep(std::time::Duration::from_millis(2100));
    home.cache.check(&output).unwrap();
    home.cache.flush_index();
    // Another process believes the index: also that this planted object is the right one.
    let again = home.reopened();
    again.check(&output).unwrap();
    let path = home.cache.object(&output.digest);
    let times = fs::metadata(&path).unwrap().modified().unwrap();
    scribble(&path, b"PLAIN TEXT");
    fs::File::options().write(true).open(&path).unwrap().set_modified(times).unwrap();
    for cache in [&home.cache, &again, &home.reopened()] {
        assert!(matches!(cache.check(&output), Err(Error::Damaged { .. })), "size and mtime agree");
    }
}
