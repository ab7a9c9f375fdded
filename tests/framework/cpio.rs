//! Writing an initramfs: the "newc" cpio format (the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::collections::BTreeSet;
use std::path::{Component, Path};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// An archive in the making. Directories appear by themselves, before what lies in them.
#[derive(Debug, Default)]
pub(crate) struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Cpio {
    /// Adds an executable file; `path` may be absolute, the archive has no root.
    pub(crate) fn file(&mut self, path: &Path, content: &[u8]) {
        let name = self.make_way(path);
        self.entry(&name, REGULAR | 0o755, content);
    }

    /// Adds a symbolic link.
    pub(crate) fn symlink(&mut self, path: &Path, target: &str) {
        let name = self.make_way(path);
        self.entry(&name, SYMLINK | 0o777, target.as_bytes());
    }

    /// Adds a directory, with its parents.
    pub(crate) fn directory(&mut self, path: &Path) {
        let name = self.make_way(path);
        self.add_directory(name);
    }

    /// The archive, with its trailer.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    /// Adds the parents of `path` that are not there yet, and returns its name in the archive.
    fn make_way(&mut self, path: &Path) -> String {
        let mut name = String::new();
        for part in path.components() {
            let Component::Normal(part) = part else { continue };
            if !name.is_empty() {
                self.add_directory(name.clone());
                name.push('/');
            }
            name.push_str(&part.to_string_lossy());
        }
        name
    }

    fn add_directory(&mut self, name: String) {
        if self.directories.insert(name.clone()) {
            self.entry(&name, DIRECTORY | 0o755, &[]);
        }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let name_len = name.len() as u32 + 1;
        // ino, mode, uid, gid, nlink, mtime, filesize, dev (2), rdev (2), namesize, check
        let fields = [self.entries, mode, 0, 0, links, 0, content.len() as u32, 0, 0, 0, 0, name_len, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn entries_are_aligned_and_parents_come_first_and_once() {
        let mut cpio = Cpio::default();
        cpio.file(Path::new("/a/b/c"), b"hello");
        cpio.file(Path::new("/a/b/d"), b"");
        let bytes = cpio.finish();
        let names: Vec<_> = names(&bytes);
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/b/d", "TRAILER!!!"]);
        assert_eq!(bytes.len() % 4, 0);
    }

    /// Walks the archive as the kernel does.
    fn names(mut bytes: &[u8]) -> Vec<String> {
        let mut names = Vec::new();
        while !bytes.is_empty() {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                usize::from_str_radix(std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap(), 16)
                    .unwrap()
            };
            let (size, name_len) = (field(6), field(11));
            names.push(String::from_utf8(bytes[110..110 + name_len - 1].to_vec()).unwrap());
            let content = (110 + name_len).next_multiple_of(4);
            bytes = &bytes[(content + size).next_multiple_of(4)..];
        }
        names
    }
}
