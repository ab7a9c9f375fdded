//! The devices at the end of a stream: is it all there?

use serde_json::Value;

use super::section;
use crate::{Error, ErrorKind, Place};

/// Bytes of a type, a number and a length of a name: what a FULL section begins with.
const SECTION_HEADER: usize = 6;
/// Bytes of EOF, VMDESCRIPTION and the length of the JSON.
const DESCRIPTION_HEADER: usize = 6;

/// Checks that `tail`, which begins at byte `begin` of its stream, runs from a device's section to the end of the
/// description of all devices. The argument is in the [module's documentation](super).
///
/// # Errors
/// `Truncated` if it has no such end, `Malformed` if the two do not belong together.
pub(super) fn check(tail: &[u8], begin: u64) -> Result<(), Error> {
    let at = |offset: usize| Place::Stream(begin + offset as u64);
    let Some(json) = description(tail) else {
        return Err(Error::new(
            ErrorKind::Truncated,
            at(tail.len()),
            "it ends before the description of its devices",
        ));
    };
    let malformed = |what: &str| Error::new(ErrorKind::Malformed, at(tail.len() - json.len()), what);
    let parsed: Value = serde_json::from_slice(json)
        .map_err(|error| malformed("the description of its devices is not JSON").because(error))?;
    let described = parsed["devices"][0]["name"].as_str();
    match (described, first_device(tail)) {
        (Some(described), Some(first)) if described.as_bytes() == first => Ok(()),
        _ => Err(malformed("the description of its devices is that of another stream")),
    }
}

/// The JSON at the end.
fn description(tail: &[u8]) -> Option<&[u8]> {
    // No byte of JSON is a control character, but bytes of its length may be none either.
    let text = tail.iter().rposition(|&byte| byte < b' ').map_or(0, |last| last + 1);
    (text..tail.len().min(text + size_of::<u32>())).find_map(|start| {
        let (header, json) = (tail.get(start.checked_sub(DESCRIPTION_HEADER)?..start)?, &tail[start..]);
        let &[section::EOF, section::VMDESCRIPTION, a, b, c, d] = header else { return None };
        let fits = u32::from_be_bytes([a, b, c, d]) as usize == json.len() && json[0] == b'{';
        fits.then_some(json)
    })
}

fn first_device(tail: &[u8]) -> Option<&[u8]> {
    let length = usize::from(*tail.get(SECTION_HEADER - 1)?);
    tail.get(SECTION_HEADER..SECTION_HEADER + length)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn tail(device: &str, inside: &[u8], json: &str) -> Vec<u8> {
        let mut bytes = vec![section::FULL, 0, 0, 0, 3, device.len() as u8];
        bytes.extend(device.as_bytes());
        bytes.extend([0; 8]);
        bytes.extend(inside);
        bytes.extend([section::FOOTER, 0, 0, 0, 3, section::EOF, section::VMDESCRIPTION]);
        bytes.extend((json.len() as u32).to_be_bytes());
        bytes.extend(json.as_bytes());
        bytes
    }

    const JSON: &str = r#"{"page_size":4096,"devices":[{"name":"timer","instance_id":0}]}"#;

    #[test]
    fn a_whole_tail_is_accepted_and_every_cut_of_it_is_noticed() {
        let whole = tail("timer", &[], JSON);
        check(&whole, 0).unwrap();
        for cut in 0..whole.len() {
            let error = check(&whole[..cut], 100).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Truncated, "cut at {cut}");
            assert_eq!(error.place(), Place::Stream(100 + cut as u64));
        }
    }

    #[test]
    fn a_device_whose_state_looks_like_an_end_does_not_end_the_tail() {
        let nested = tail("timer", &[], JSON);
        check(&tail("timer", &nested, JSON), 0).unwrap();
        // Bytes of the length look like the description's mark, or like text.
        for length in [0x606, 0x2122, 0x7b7b, 0x60_006, 0x20_2020] {
            let json = [JSON, &" ".repeat(length - JSON.len())].concat();
            check(&tail("timer", &nested, &json), 0).unwrap();
        }
    }

    #[test]
    fn a_description_of_other_devices_is_refused() {
        let error = check(&tail("cpu", &[], JSON), 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed);
    }
}
