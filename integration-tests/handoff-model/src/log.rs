//! The log of the slot: at most seven commands.

use std::fmt;

use kuma_cluster::Content;

/// Numbers of commands in their order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Log {
    len: u8,
    commands: u32,
}

impl Log {
    pub(crate) fn len(self) -> u8 {
        self.len
    }

    pub(crate) fn is_empty(self) -> bool {
        self.len == 0
    }

    pub(crate) fn commands(self) -> impl Iterator<Item = u8> {
        (0..self.len).map(move |at| ((self.commands >> (4 * at)) & 15) as u8)
    }

    pub(crate) fn push(&mut self, command: u8) {
        self.commands |= u32::from(command) << (4 * self.len);
        self.len += 1;
    }

    pub(crate) fn has(self, command: u8) -> bool {
        self.commands().any(|other| other == command)
    }

    pub(crate) fn first(self, len: u8) -> Log {
        let mut log = Log::default();
        self.commands().take(usize::from(len)).for_each(|command| log.push(command));
        log
    }

    pub(crate) fn is_prefix_of(self, other: Log) -> bool {
        self.len <= other.len && other.first(self.len) == self
    }

    /// As bits.
    pub(crate) fn set(self) -> u8 {
        self.commands().fold(0, |set, command| set | 1 << command)
    }

    pub(crate) fn has_duplicates(self) -> bool {
        self.set().count_ones() < u32::from(self.len)
    }

    /// What is said of it to others.
    pub(crate) fn content(self) -> Content {
        let mut digest = [0; 32];
        digest[..4].copy_from_slice(&self.commands.to_le_bytes());
        Content { len: u64::from(self.len), digest }
    }
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.commands()).finish()
    }
}
