//! The one layer of the image: an archive whose bytes depend on the files alone.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use tar::{Builder, EntryType, Header};

const PROGRAM: u32 = 0o755;
const DATA: u32 = 0o644;

/// Packs programs under their paths (without a leading slash), with the directories above them.
pub(crate) fn pack(files: &[(String, Vec<u8>)]) -> io::Result<Vec<u8>> {
    let mut archive = Builder::new(Vec::new());
    let mut directories = BTreeSet::new();
    for (path, _) in files {
        directories.extend(Path::new(path).ancestors().skip(1));
    }
    for directory in directories {
        if directory != Path::new("") {
            let name = format!("{}/", directory.display());
            add(&mut archive, &name, EntryType::Directory, PROGRAM, &[])?;
        }
    }
    let mut sorted: Vec<_> = files.iter().collect();
    sorted.sort();
    for (path, content) in sorted {
        add(&mut archive, path, EntryType::Regular, PROGRAM, content)?;
    }
    archive.into_inner()
}

/// Packs data files as they are listed, without directories.
pub(crate) fn pack_data(files: &[(String, Vec<u8>)]) -> io::Result<Vec<u8>> {
    let mut archive = Builder::new(Vec::new());
    for (path, content) in files {
        add(&mut archive, path, EntryType::Regular, DATA, content)?;
    }
    archive.into_inner()
}

fn add(
    archive: &mut Builder<Vec<u8>>,
    path: &str,
    kind: EntryType,
    mode: u32,
    content: &[u8],
) -> io::Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(content.len() as u64);
    archive.append_data(&mut header, path, content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_the_same_whatever_the_order() {
        let file = |path: &str| (path.to_owned(), path.as_bytes().to_vec());
        let one = pack(&[file("usr/bin/b"), file("opt/a")]).unwrap();
        let two = pack(&[file("opt/a"), file("usr/bin/b")]).unwrap();
        assert_eq!(one, two);
        let mut archive = tar::Archive::new(one.as_slice());
        let entries: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let header = entry.header();
                assert_eq!((header.mtime().unwrap(), header.uid().unwrap()), (0, 0));
                let path = entry.path().unwrap().display().to_string();
                (path, header.mode().unwrap(), header.size().unwrap())
            })
            .collect();
        let expected = [
            ("opt/", 0o755, 0),
            ("usr/", 0o755, 0),
            ("usr/bin/", 0o755, 0),
            ("opt/a", 0o755, 5),
            ("usr/bin/b", 0o755, 9),
        ];
        let expected = expected.map(|(path, mode, size)| (path.to_owned(), mode, size));
        assert_eq!(entries, expected);
    }
}
