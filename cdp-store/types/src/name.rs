//! The one rule for names that users give.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a name is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{name}' is not a valid {what}: 1 to 64 characters from a-z, A-Z, 0-9, '.', '_' and '-', \
     the first a letter or a digit"
)]
pub struct NameError {
    what: &'static str,
    name: String,
}

fn check(what: &'static str, name: &str) -> Result<(), NameError> {
    let tail = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let ok = name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(tail)
        && name != "head";
    // What is echoed is cut and escaped: the name may come from the network.
    ok.then_some(()).ok_or_else(|| NameError { what, name: name.escape_debug().take(80).collect() })
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                check($what, name).map(|()| Self(name.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(name: String) -> Result<Self, NameError> {
                check($what, &name).map(|()| Self(name))
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// The name of a volume, unique in its store.
    VolumeName,
    "volume name"
);
name!(
    /// The name of a virtual machine, unique in its store.
    VmName,
    "machine name"
);
name!(
    /// The name of a mark, unique in its volume, or of a checkpoint, unique in its machine.
    Label,
    "mark label"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_read_as_something_else_are_refused() {
        for bad in ["", "-x", ".x", "a/b", "a@b", "a b", "a:b", "ü", "head", &"x".repeat(65)] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad}");
        }
        for good in ["web1", "0", "a.b_c-d", &"x".repeat(64)] {
            assert!(good.parse::<VolumeName>().is_ok(), "{good}");
        }
    }

    #[test]
    fn the_rule_holds_for_deserialised_names_too() {
        assert!(VolumeName::try_from("a/b".to_owned()).is_err());
    }
}
