//! An open file of the wrapped VFS.
//!
//! Invariants: the memory of the wrapped `sqlite3_file` never moves between `xOpen` and `xClose`, and `xClose` is
//! called once.

use std::ffi::{c_int, c_void};

use libsqlite3_sys as ffi;

use super::result;
use crate::machine::{Code, RealFile};

/// The file. Closes itself when dropped.
pub(super) struct Real {
    /// An allocation of `words` words, with the wrapped VFS's `sqlite3_file` in it.
    pub(super) file: *mut ffi::sqlite3_file,
    words: usize,
}

/// Calls a method of the wrapped file; `$otherwise` is the answer if it has no such method.
macro_rules! call {
    ($real:expr, $method:ident($($arg:expr),*), $otherwise:expr) => {{
        let file = $real.file;
        // SAFETY: the file is open, so its methods are set; the arguments are SQLite's own, or point to memory of the
        // stated size.
        unsafe { (*(*file).pMethods).$method.map_or($otherwise, |method| method(file, $($arg),*)) }
    }};
}
pub(super) use call;

impl Real {
    /// Opens a file with the wrapped VFS.
    ///
    /// # Safety
    /// `base` must be a VFS that lives for ever; `name` null or as SQLite passes it to `xOpen`; `out_flags` null or
    /// writable.
    pub(super) unsafe fn open(
        base: *mut ffi::sqlite3_vfs,
        name: ffi::sqlite3_filename,
        flags: c_int,
        out_flags: *mut c_int,
    ) -> Result<Self, Code> {
        // SAFETY: `base` is valid by this function's contract.
        let (bytes, open) = unsafe { ((*base).szOsFile as usize, (*base).xOpen) };
        let open = open.ok_or(ffi::SQLITE_CANTOPEN)?;
        let words = bytes.div_ceil(size_of::<u64>());
        let file = Box::into_raw(vec![0_u64; words].into_boxed_slice()).cast::<ffi::sqlite3_file>();
        let mut real = Self { file, words };
        // SAFETY: `file` has szOsFile zeroed bytes, aligned to 8; the rest is as SQLite gave it.
        let opened = result(unsafe { open(base, name, file, flags, out_flags) });
        opened?; // after an error, the drop calls xClose only if there are methods
        let mut no_mapping: ffi::sqlite3_int64 = 0;
        real.file_control(ffi::SQLITE_FCNTL_MMAP_SIZE, (&raw mut no_mapping).cast());
        Ok(real)
    }

    /// `xFileControl`.
    pub(super) fn file_control(&mut self, operation: c_int, argument: *mut c_void) -> c_int {
        call!(self, xFileControl(operation, argument), ffi::SQLITE_NOTFOUND)
    }
}

impl RealFile for Real {
    fn read(&mut self, buffer: &mut [u8], offset: u64) -> Result<(), Code> {
        if buffer.is_empty() {
            return Ok(());
        }
        let (start, len) = (buffer.as_mut_ptr().cast(), buffer.len() as c_int);
        result(call!(self, xRead(start, len, offset as i64), ffi::SQLITE_IOERR_READ))
    }

    fn write(&mut self, bytes: &[u8], offset: u64) -> Result<(), Code> {
        let (start, len) = (bytes.as_ptr().cast(), bytes.len() as c_int);
        result(call!(self, xWrite(start, len, offset as i64), ffi::SQLITE_IOERR_WRITE))
    }

    fn truncate(&mut self, len: u64) -> Result<(), Code> {
        result(call!(self, xTruncate(len as i64), ffi::SQLITE_IOERR_TRUNCATE))
    }

    fn len(&mut self) -> Result<u64, Code> {
        let mut len = 0;
        result(call!(self, xFileSize(&raw mut len), ffi::SQLITE_IOERR_FSTAT))?;
        Ok(len as u64)
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        // SAFETY: the allocation lives until the end of this function.
        if unsafe { !(*self.file).pMethods.is_null() } {
            let _nobody_to_tell = call!(self, xClose(), ffi::SQLITE_OK);
        }
        // SAFETY: made by Box::into_raw from a boxed slice of this many words in `open`, and freed only here.
        drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(self.file.cast::<u64>(), self.words)) });
    }
}
