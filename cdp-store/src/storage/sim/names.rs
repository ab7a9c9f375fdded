//! The names of files and directories, with the same two views as a file's content.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use rand::Rng;
use rand::rngs::SmallRng;

pub(super) type InodeId = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Directory,
    File(InodeId),
}

type View = BTreeMap<String, Entry>;

/// A creation or removal that no sync of its directory has covered yet.
#[derive(Clone)]
struct Change {
    name: String,
    becomes: Option<Entry>,
}

#[derive(Clone, Default)]
pub(super) struct Names {
    volatile: View,
    durable: View,
    changes: Vec<Change>,
}

/// The directory that a name lies in; `""` is the store's own.
fn parent(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(parent, _)| parent)
}

impl Names {
    pub(super) fn get(&self, name: &str) -> Option<Entry> {
        self.volatile.get(name).copied()
    }

    fn is_directory(&self, name: &str) -> bool {
        name.is_empty() || self.get(name) == Some(Entry::Directory)
    }

    pub(super) fn create(&mut self, name: &str, entry: Entry) -> io::Result<()> {
        if self.volatile.contains_key(name) {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        if !self.is_directory(parent(name)) {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        self.change(name, Some(entry));
        Ok(())
    }

    pub(super) fn remove(&mut self, name: &str) -> io::Result<()> {
        match self.get(name) {
            None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            Some(Entry::Directory) => Err(io::Error::from_raw_os_error(libc::EISDIR)),
            Some(Entry::File(_)) => {
                self.change(name, None);
                Ok(())
            }
        }
    }

    fn change(&mut self, name: &str, becomes: Option<Entry>) {
        apply(&mut self.volatile, name, becomes);
        self.changes.push(Change { name: name.to_owned(), becomes });
    }

    pub(super) fn list(&self, directory: &str) -> Vec<String> {
        let inside = |name: &&String| parent(name) == directory;
        let base = if directory.is_empty() { 0 } else { directory.len() + 1 };
        self.files().iter().filter(inside).map(|name| name[base..].to_owned()).collect()
    }

    pub(super) fn files(&self) -> Vec<String> {
        let files = self.volatile.iter().filter(|(_, entry)| matches!(entry, Entry::File(_)));
        files.map(|(name, _)| name.clone()).collect()
    }

    /// Makes the changes in a directory durable.
    pub(super) fn sync(&mut self, directory: &str) -> io::Result<()> {
        if !self.is_directory(directory) {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        let durable = &mut self.durable;
        self.changes.retain(|change| {
            let covered = parent(&change.name) == directory;
            if covered {
                apply(durable, &change.name, change.becomes);
            }
            !covered
        });
        Ok(())
    }

    /// Leaves what a power cut leaves: of each name's changes a beginning, and nothing in a directory that has gone.
    pub(super) fn cut_power(&mut self, rng: &mut SmallRng) {
        let changes = std::mem::take(&mut self.changes);
        let mut stopped = BTreeSet::new();
        for Change { name, becomes } in changes {
            if !stopped.contains(&name) && rng.random() {
                apply(&mut self.durable, &name, becomes);
            } else {
                stopped.insert(name);
            }
        }
        // In order, a directory comes before what is in it.
        let mut left = View::new();
        for (name, entry) in std::mem::take(&mut self.durable) {
            let up = parent(&name);
            if up.is_empty() || left.get(up) == Some(&Entry::Directory) {
                left.insert(name, entry);
            }
        }
        self.durable = left;
        self.volatile = self.durable.clone();
    }

    /// The files that a reader can open.
    pub(super) fn linked(&self) -> BTreeSet<InodeId> {
        files_of(&self.volatile)
    }

    /// The files that a reader can open now, or might after a power cut.
    pub(super) fn reachable(&self) -> BTreeSet<InodeId> {
        let pending = self.changes.iter().filter_map(|change| match change.becomes {
            Some(Entry::File(inode)) => Some(inode),
            Some(Entry::Directory) | None => None,
        });
        let mut all = files_of(&self.volatile);
        all.extend(files_of(&self.durable));
        all.extend(pending);
        all
    }
}

fn files_of(view: &View) -> BTreeSet<InodeId> {
    let file = |entry: &Entry| match entry {
        Entry::File(inode) => Some(*inode),
        Entry::Directory => None,
    };
    view.values().filter_map(file).collect()
}

fn apply(view: &mut View, name: &str, becomes: Option<Entry>) {
    match becomes {
        Some(entry) => view.insert(name.to_owned(), entry),
        None => view.remove(name),
    };
}
