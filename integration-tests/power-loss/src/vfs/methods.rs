//! The methods of an open file.
//!
//! Reads, locks and shared memory go to the wrapped file; writes, syncs and truncations go through the machine.
//!
//! Invariants:
//! - After a cut everything that could make progress fails: reading, writing, taking a lock. Releasing and closing
//!   still work, and touch nothing that a later connection uses.
//! - SQLite uses one handle from one thread at a time (it holds the connection's mutex), hence `&mut Handle`.
//! - Version 2 of the table: it ends before `xFetch`, so SQLite maps no file into memory.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use libsqlite3_sys as ffi;

use super::code;
use super::real::{Real, call};
use crate::machine::{Machine, RealFile, Tracked};

/// What SQLite allocates for each open file.
#[repr(C)]
pub(super) struct OpenFile {
    base: ffi::sqlite3_file,
    handle: *mut Handle,
}

/// An open file.
pub(super) struct Handle {
    machine: Arc<Machine>,
    real: Real,
    /// `None` for a temporary file, which the machine leaves alone.
    tracked: Option<Tracked>,
}

impl OpenFile {
    pub(super) fn new(handle: Handle) -> Self {
        Self { base: ffi::sqlite3_file { pMethods: &raw const METHODS }, handle: Box::into_raw(Box::new(handle)) }
    }
}

impl Handle {
    pub(super) fn new(machine: Arc<Machine>, real: Real, tracked: Option<Tracked>) -> Self {
        Self { machine, real, tracked }
    }
}

/// The handle of a file that SQLite hands to one of the methods.
///
/// # Safety
/// `file` must be an [`OpenFile`] that is open, used by no other thread now, and the result must not outlive the
/// method.
unsafe fn handle<'a>(file: *mut ffi::sqlite3_file) -> &'a mut Handle {
    // SAFETY: x_open put a boxed Handle there, and x_close is the only one to take it.
    unsafe { &mut *(*file.cast::<OpenFile>()).handle }
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 2,
    xClose: Some(x_close),
    xRead: Some(x_read),
    xWrite: Some(x_write),
    xTruncate: Some(x_truncate),
    xSync: Some(x_sync),
    xFileSize: Some(x_file_size),
    xLock: Some(x_lock),
    xUnlock: Some(x_unlock),
    xCheckReservedLock: Some(x_check_reserved_lock),
    xFileControl: Some(x_file_control),
    xSectorSize: Some(x_sector_size),
    xDeviceCharacteristics: Some(x_device_characteristics),
    xShmMap: Some(x_shm_map),
    xShmLock: Some(x_shm_lock),
    xShmBarrier: Some(x_shm_barrier),
    xShmUnmap: Some(x_shm_unmap),
    xFetch: None,
    xUnfetch: None,
};

unsafe extern "C" fn x_close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: the file is open, and SQLite never uses it again; the box is the one that x_open made.
    let handle = unsafe { Box::from_raw((*file.cast::<OpenFile>()).handle) };
    // SAFETY: SQLite's memory, still allocated during this call.
    unsafe { (*file).pMethods = std::ptr::null() };
    let Handle { machine, real, tracked } = *handle;
    drop(real);
    if let Some(tracked) = tracked {
        machine.close(&tracked);
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_read(
    file: *mut ffi::sqlite3_file,
    buffer: *mut c_void,
    amount: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let handle = unsafe { handle(file) };
    if handle.machine.is_dead() {
        return ffi::SQLITE_IOERR_READ;
    }
    call!(handle.real, xRead(buffer, amount, offset), ffi::SQLITE_IOERR_READ)
}

unsafe extern "C" fn x_write(
    file: *mut ffi::sqlite3_file,
    bytes: *const c_void,
    amount: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let Handle { machine, real, tracked } = unsafe { handle(file) };
    // SAFETY: SQLite passes `amount` readable bytes, and does not change them during the call.
    let bytes = unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), amount as usize) };
    match tracked {
        Some(tracked) => code(machine.write(tracked, real, bytes, offset as u64)),
        None if machine.is_dead() => ffi::SQLITE_IOERR_WRITE,
        None => code(real.write(bytes, offset as u64)),
    }
}

unsafe extern "C" fn x_truncate(file: *mut ffi::sqlite3_file, len: ffi::sqlite3_int64) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let Handle { machine, real, tracked } = unsafe { handle(file) };
    match tracked {
        Some(tracked) => code(machine.truncate(tracked, real, len as u64)),
        None if machine.is_dead() => ffi::SQLITE_IOERR_TRUNCATE,
        None => code(real.truncate(len as u64)),
    }
}

unsafe extern "C" fn x_sync(file: *mut ffi::sqlite3_file, _flags: c_int) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let Handle { machine, tracked, .. } = unsafe { handle(file) };
    match tracked {
        Some(tracked) => code(machine.sync(tracked)),
        None if machine.is_dead() => ffi::SQLITE_IOERR_FSYNC,
        None => ffi::SQLITE_OK, // a temporary file does not have to survive
    }
}

unsafe extern "C" fn x_file_size(file: *mut ffi::sqlite3_file, out: *mut ffi::sqlite3_int64) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let handle = unsafe { handle(file) };
    if handle.machine.is_dead() {
        return ffi::SQLITE_IOERR_FSTAT;
    }
    call!(handle.real, xFileSize(out), ffi::SQLITE_IOERR_FSTAT)
}

unsafe extern "C" fn x_lock(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let handle = unsafe { handle(file) };
    if handle.machine.is_dead() {
        return ffi::SQLITE_IOERR_LOCK;
    }
    call!(handle.real, xLock(level), ffi::SQLITE_IOERR_LOCK)
}

unsafe extern "C" fn x_unlock(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let handle = unsafe { handle(file) };
    call!(handle.real, xUnlock(level), ffi::SQLITE_OK)
}

unsafe extern "C" fn x_check_reserved_lock(file: *mut ffi::sqlite3_file, out: *mut c_int) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let handle = unsafe { handle(file) };
    if handle.machine.is_dead() {
        return ffi::SQLITE_IOERR_CHECKRESERVEDLOCK;
    }
    call!(handle.real, xCheckReservedLock(out), ffi::SQLITE_IOERR_CHECKRESERVEDLOCK)
}

unsafe extern "C" fn x_file_control(file: *mut ffi::sqlite3_file, operation: c_int, argument: *mut c_void) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let handle = unsafe { handle(file) };
    match operation {
        // Mapped memory would hide reads, and sizes that change without a write or a truncation would hide changes.
        ffi::SQLITE_FCNTL_MMAP_SIZE => {
            // SAFETY: for this operation SQLite documents the argument as a pointer to a 64-bit number, in and out.
            unsafe { *argument.cast::<ffi::sqlite3_int64>() = 0 };
            ffi::SQLITE_OK
        }
        ffi::SQLITE_FCNTL_CHUNK_SIZE | ffi::SQLITE_FCNTL_SIZE_HINT => ffi::SQLITE_OK,
        ffi::SQLITE_FCNTL_NULL_IO => ffi::SQLITE_NOTFOUND, // would close the descriptor below us
        _ => handle.real.file_control(operation, argument),
    }
}

unsafe extern "C" fn x_sector_size(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let handle = unsafe { handle(file) };
    call!(handle.real, xSectorSize(), 0)
}

unsafe extern "C" fn x_device_characteristics(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let handle = unsafe { handle(file) };
    call!(handle.real, xDeviceCharacteristics(), 0)
}

unsafe extern "C" fn x_shm_map(
    file: *mut ffi::sqlite3_file,
    region: c_int,
    bytes: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let handle = unsafe { handle(file) };
    // Under the lock, because it may create the file that a cut removes.
    let Some(_alive) = handle.machine.lock_alive() else { return ffi::SQLITE_IOERR_SHMMAP };
    call!(handle.real, xShmMap(region, bytes, extend, out), ffi::SQLITE_IOERR_SHMMAP)
}

unsafe extern "C" fn x_shm_lock(file: *mut ffi::sqlite3_file, offset: c_int, n: c_int, flags: c_int) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let handle = unsafe { handle(file) };
    if handle.machine.is_dead() && flags & ffi::SQLITE_SHM_UNLOCK == 0 {
        return ffi::SQLITE_IOERR_SHMLOCK;
    }
    call!(handle.real, xShmLock(offset, n, flags), ffi::SQLITE_IOERR_SHMLOCK)
}

unsafe extern "C" fn x_shm_barrier(file: *mut ffi::sqlite3_file) {
    // SAFETY: an open file of this VFS, for the length of this call.
    let handle = unsafe { handle(file) };
    let () = call!(handle.real, xShmBarrier(), ());
}

unsafe extern "C" fn x_shm_unmap(file: *mut ffi::sqlite3_file, delete: c_int) -> c_int {
    // SAFETY: an open file of this VFS, for the length of this call.
    let handle = unsafe { handle(file) };
    let alive = handle.machine.lock_alive();
    // After the cut a file of this name belongs to whoever opened the database since.
    let delete = if alive.is_some() { delete } else { 0 };
    call!(handle.real, xShmUnmap(delete), ffi::SQLITE_OK)
}
