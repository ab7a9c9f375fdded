//! The file of pre-shared keys, in the format of GnuTLS's `psktool`.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Shorter keys, in bytes, can be guessed by whoever has watched or provoked a handshake (RFC 9257, section 6).
const SHORTEST_KEY: usize = 16;
/// What `psktool` makes at most, in bytes; a hash of it takes as long as of any shorter key.
const LONGEST_KEY: usize = 64;
/// What every implementation takes (RFC 4279, section 5.3), in bytes.
const LONGEST_USER: usize = 128;
/// No file of keys is longer, in bytes.
const LONGEST_FILE: u64 = 16 << 20;

/// Users and their keys. It cannot be printed, and its errors tell of no key.
pub(super) struct KeyFile(HashMap<Vec<u8>, Box<[u8]>>);

impl KeyFile {
    /// Reads a file that nobody but its owner may look at.
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let file = File::open(path)?;
        let about = file.metadata()?;
        let mode = about.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(format!(
                "others than its owner may use it (its mode is {mode:04o}), and whoever can read it can be any of \
                 its users: chmod 600"
            )
            .into());
        }
        if !about.is_file() || about.len() > LONGEST_FILE {
            return Err(format!("it is no regular file of at most {LONGEST_FILE} bytes").into());
        }
        let mut text = Vec::new();
        file.take(LONGEST_FILE).read_to_end(&mut text)?;
        Self::parse(&text)
    }

    /// Of each line `USER:HEXKEY`; a user with a colon, a line break or the like is written `#HEXUSER`.
    fn parse(text: &[u8]) -> Result<Self, Failure> {
        let mut keys = HashMap::new();
        for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
            let line = line.trim_ascii_end();
            if line.is_empty() {
                continue;
            }
            let number = index + 1;
            let (user, key) = parse_line(line).map_err(|what| format!("line {number}: {what}"))?;
            if keys.insert(user, key).is_some() {
                return Err(format!("line {number}: this user has a key already").into());
            }
        }
        if keys.is_empty() {
            return Err("there is no key in it".into());
        }
        Ok(Self(keys))
    }

    /// The user's key.
    pub(super) fn key(&self, user: &[u8]) -> Option<&[u8]> {
        self.0.get(user).map(AsRef::as_ref)
    }
}

fn parse_line(line: &[u8]) -> Result<(Vec<u8>, Box<[u8]>), String> {
    let colon = line.iter().position(|byte| *byte == b':').ok_or("it is not USER:HEXKEY")?;
    let (user, key) = (&line[..colon], &line[colon + 1..]);
    let user = match user {
        [b'#', digits @ ..] if !digits.is_empty() => {
            from_hex(digits).ok_or("behind #, a user must be written in hexadecimal digits")?
        }
        user => user.to_vec(),
    };
    if user.is_empty() || user.len() > LONGEST_USER || user.contains(&0) {
        return Err(format!("a user has 1 to {LONGEST_USER} bytes, none of which is zero"));
    }
    let key = from_hex(key).ok_or("the key must be written in hexadecimal digits")?;
    if !(SHORTEST_KEY..=LONGEST_KEY).contains(&key.len()) {
        return Err(format!("the key must have {SHORTEST_KEY} to {LONGEST_KEY} bytes, twice as many digits"));
    }
    Ok((user, key.into()))
}

fn from_hex(digits: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let (pairs, []) = digits.as_chunks::<2>() else { return None };
    pairs.iter().map(|[high, low]| u8::try_from(digit(*high)? << 4 | digit(*low)?).ok()).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const KEY: &str = "000102030405060708090a0b0c0d0e0F";

    fn refusal(text: &[u8]) -> String {
        KeyFile::parse(text).err().unwrap().to_string()
    }

    #[test]
    fn users_have_their_keys() {
        let text = format!("alice:{KEY}\n\nbob:{}\r\n#613a0a:{KEY}\n#:{KEY}", "ab".repeat(64));
        let file = KeyFile::parse(text.as_bytes()).unwrap();
        let key: Vec<u8> = (0..16).collect();
        assert_eq!(file.key(b"alice"), Some(&key[..]));
        assert_eq!(file.key(b"bob"), Some(&[0xab; 64][..]));
        assert_eq!(file.key(b"a:\n"), Some(&key[..]));
        assert_eq!(file.key(b"#"), Some(&key[..]));
        assert_eq!(file.key(b"carol"), None);
    }

    #[test]
    fn what_is_wrong_is_told_by_its_line_and_without_the_key() {
        let long = "x".repeat(LONGEST_USER + 1);
        for (line, what) in [
            ("alice".to_owned(), "USER:HEXKEY"),
            (format!(":{KEY}"), "a user has"),
            (format!("{long}:{KEY}"), "a user has"),
            (format!("#00:{KEY}"), "a user has"),
            (format!("#xy:{KEY}"), "behind #"),
            (format!("bob:{KEY}"), "already"),
            (format!("alice:{KEY}0"), "hexadecimal"),
            (format!("alice:{KEY}+1"), "hexadecimal"),
            (format!("alice:{}", &KEY[2..]), "16 to 64 bytes"),
            (format!("alice:{}", "00".repeat(65)), "16 to 64 bytes"),
        ] {
            let told = refusal(format!("bob:{KEY}\n{line}\n").as_bytes());
            assert!(told.starts_with("line 2: ") && told.contains(what), "{line}: {told}");
            assert!(!told.contains(&KEY[2..]));
        }
        for nothing in [&b""[..], b"\n", b" \n\r\n"] {
            assert_eq!(refusal(nothing), "there is no key in it");
        }
    }

    #[test]
    fn a_file_that_others_may_use_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.psk");
        fs::write(&path, format!("alice:{KEY}\n")).unwrap();
        for mode in [0o640, 0o604, 0o620, 0o601] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let told = KeyFile::read(&path).err().unwrap().to_string();
            assert!(told.contains(&format!("{mode:04o}")) && told.contains("chmod 600"), "{told}");
        }
        for mode in [0o600, 0o400] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert!(KeyFile::read(&path).is_ok());
        }
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(KeyFile::read(directory.path()).err().unwrap().to_string().contains("regular file"));
        assert!(KeyFile::read(&directory.path().join("missing")).is_err());
    }
}
