//! Results of compilers, stored under the hash of all that they were made from.
//!
//! Every profile and every build of a checkout shares them, so nothing is compiled or assembled twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Entries that no build has read for this long are removed.
const UNUSED: Duration = Duration::from_secs(14 * 24 * 60 * 60);

/// A hash of 128 bits: FNV-1a. It tells versions of our own sources apart; it is no protection against forgery.
#[derive(Clone, Copy)]
pub struct Hash(u128);

impl Hash {
    /// The hash of no parts.
    pub const EMPTY: Self = Hash(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);

    /// Adds one part. Its length is hashed too, so that parts cannot run into each other.
    #[must_use]
    pub fn with(mut self, part: impl AsRef<[u8]>) -> Self {
        let part = part.as_ref();
        for &byte in (part.len() as u64).to_le_bytes().iter().chain(part) {
            self.0 = (self.0 ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
        self
    }
    /// The hash as a file name.
    pub fn name(self) -> String {
        format!("{:032x}", self.0)
    }
}

/// One folder of entries.
pub struct Cache(PathBuf);

impl Cache {
    /// Opens the folder, which is made if need be, and removes what has not been used for a long time.
    ///
    /// # Errors
    /// A folder that can't be made.
    pub fn open(folder: PathBuf) -> Result<Self, String> {
        fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            if modified.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > UNUSED)) {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(Cache(folder))
    }

    /// Returns the path of an entry, or where to put it. Marks the entry as used.
    pub fn path(&self, name: &str) -> (PathBuf, bool) {
        let path = self.0.join(name);
        let file = fs::File::options().append(true).open(&path);
        let is_there = file.map(|file| file.set_modified(SystemTime::now())).is_ok();
        (path, is_there)
    }

    /// Reads an entry.
    pub fn read(&self, name: &str) -> Option<Vec<u8>> {
        match self.path(name) {
            (path, true) => fs::read(path).ok(),
            _ => None,
        }
    }

    /// Stores an entry. It appears complete or not at all.
    ///
    /// # Errors
    /// A file that can't be written.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), String> {
        let partial = self.0.join(format!("{name}.partial"));
        write(&partial, bytes)?;
        let path = self.0.join(name);
        fs::rename(&partial, &path).map_err(|error| format!("{}: {error}", path.display()))
    }
}

/// Writes a file; the error names it.
///
/// # Errors
/// A file that can't be written.
pub fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<(), String> {
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}

/// Reads a file; the error names it.
///
/// # Errors
/// A file that can't be read.
pub fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Hash of the names and contents of all files of a folder, with those of its folders.
///
/// # Errors
/// A file that can't be read.
pub fn hash_of_folder(hash: Hash, folder: &Path) -> Result<Hash, String> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort_unstable();
    paths.into_iter().try_fold(hash, |hash, path| {
        let hash = hash.with(path.file_name().unwrap_or_default().as_encoded_bytes());
        if path.is_dir() { hash_of_folder(hash, &path) } else { Ok(hash.with(read(&path)?)) }
    })
}
