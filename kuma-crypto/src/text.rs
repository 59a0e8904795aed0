//! Text with its length in front, so that ("ab", "c") and ("a", "bc") are different bytes.
//!
//! Invariant: the encoding is injective for any text. Below 65 535 bytes it is a u16 length; from there on the mark
//! 0xffff and a u64 length, so that no caller has to handle a kind that is too long.

/// Room for either form of the length.
pub(crate) const TEXT_PREFIX_BYTES_MAX: usize = 2 + 8;

/// Appends the length of `text`, then `text`.
pub(crate) fn push(to: &mut Vec<u8>, text: &str) {
    match u16::try_from(text.len()) {
        Ok(length) if length < u16::MAX => to.extend_from_slice(&length.to_le_bytes()),
        _ => {
            to.extend_from_slice(&u16::MAX.to_le_bytes());
            to.extend_from_slice(&(text.len() as u64).to_le_bytes());
        }
    }
    to.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(text: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        push(&mut bytes, text);
        bytes
    }

    #[test]
    fn a_short_text_has_a_u16_length() {
        assert_eq!(encoded("order"), b"\x05\x00order");
        assert_eq!(encoded(""), b"\x00\x00");
        assert_eq!(encoded(&"x".repeat(65_534))[..3], *b"\xfe\xffx");
    }

    #[test]
    fn a_huge_text_still_carries_its_exact_length() {
        assert_eq!(encoded(&"x".repeat(65_535))[..11], *b"\xff\xff\xff\xff\x00\x00\x00\x00\x00\x00x");
        assert_eq!(encoded(&"x".repeat(65_536))[..11], *b"\xff\xff\x00\x00\x01\x00\x00\x00\x00\x00x");
    }
}
