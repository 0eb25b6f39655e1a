//! Writes cpio archives ("newc"), which is what the kernel unpacks as its first file system.

use std::collections::BTreeSet;
use std::io::{Result, Write};
use std::path::{Component, Path};

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

/// An archive being written.
pub(crate) struct Archive<W> {
    out: W,
    inode: u32,
    position: u64,
    directories: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    /// An empty archive.
    pub(crate) fn new(out: W) -> Self {
        Self {
            out,
            inode: 0,
            position: 0,
            directories: BTreeSet::new(),
        }
    }

    /// Adds a directory and those above it.
    pub(crate) fn directory(&mut self, path: &Path) -> Result<()> {
        let mut name = String::new();
        for part in path.components() {
            let Component::Normal(part) = part else {
                continue;
            };
            if !name.is_empty() {
                name.push('/');
            }
            name.push_str(&part.to_string_lossy());
            if self.directories.insert(name.clone()) {
                self.entry(&name, DIRECTORY, &[])?;
            }
        }
        Ok(())
    }

    /// Adds an executable file, and the directories above it.
    pub(crate) fn file(&mut self, path: &Path, content: &[u8]) -> Result<()> {
        self.below(path, PROGRAM, content)
    }

    /// Adds a symbolic link, and the directories above it.
    pub(crate) fn link(&mut self, path: &Path, target: &Path) -> Result<()> {
        self.below(path, LINK, target.to_string_lossy().as_bytes())
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> Result<W> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn below(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        let name = path.to_string_lossy();
        self.entry(name.trim_start_matches('/'), mode, content)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len()).map_err(std::io::Error::other)?;
        let name_size = u32::try_from(name.len() + 1).map_err(std::io::Error::other)?;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let mut header = String::from("070701");
        // inode, mode, uid, gid, links, time, size, device (2), special device (2), name, checksum
        for field in [
            self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0,
        ] {
            header.push_str(&format!("{field:08x}"));
        }
        self.write(header.as_bytes())?;
        self.write(name.as_bytes())?;
        self.write(&[0])?;
        self.pad()?;
        self.write(content)?;
        self.pad()
    }

    fn pad(&mut self) -> Result<()> {
        while !self.position.is_multiple_of(4) {
            self.write(&[0])?;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes)?;
        self.position += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_laid_out_as_the_kernel_reads_it() -> Result<()> {
        let mut archive = Archive::new(Vec::new());
        archive.file(Path::new("/a/b"), b"hello")?;
        archive.file(Path::new("/a/c"), b"")?;
        archive.link(Path::new("/d"), Path::new("a/b"))?;
        let bytes = archive.finish()?;
        assert_eq!(bytes.len() % 4, 0);
        let mut rest = bytes.as_slice();
        let mut seen = Vec::new();
        while !rest.is_empty() {
            let field = |index: usize| {
                let at = 6 + index * 8;
                usize::from_str_radix(std::str::from_utf8(&rest[at..at + 8]).unwrap(), 16).unwrap()
            };
            assert_eq!(&rest[..6], b"070701");
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = String::from_utf8(rest[110..110 + name_size - 1].to_vec()).unwrap();
            let content = (110 + name_size).next_multiple_of(4);
            let text = String::from_utf8(rest[content..content + size].to_vec()).unwrap();
            rest = &rest[(content + size).next_multiple_of(4)..];
            seen.push((name, mode, text));
        }
        let expected = [
            ("a", 0o040_755, ""),
            ("a/b", 0o100_755, "hello"),
            ("a/c", 0o100_755, ""),
            ("d", 0o120_777, "a/b"),
            ("TRAILER!!!", 0, ""),
        ];
        let expected = expected.map(|(name, mode, text)| (name.to_owned(), mode, text.to_owned()));
        assert_eq!(seen, expected);
        Ok(())
    }
}
