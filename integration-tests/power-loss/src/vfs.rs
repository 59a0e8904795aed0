//! The VFS as SQLite sees it: the table of functions, registered under a name.
//!
//! Invariants:
//! - The table and its context are leaked on purpose: SQLite keeps pointers to them for as long as the process lives,
//!   and a connection may be closed long after the test let go of its handle.
//! - `pMethods` of a file is set if and only if it was opened, so that SQLite calls `xClose` exactly for those.
//! - What concerns no file (time, randomness, extensions) is the wrapped VFS's business, asked with its own pointer.
#![allow(unsafe_code)] // a VFS is a table of C functions; see the crate's documentation

mod methods;
mod real;

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use libsqlite3_sys as ffi;

use crate::machine::{Code, Machine};
use methods::{Handle, OpenFile};
use real::Real;

/// What the functions of one VFS need.
struct Context {
    machine: Arc<Machine>,
    base: *mut ffi::sqlite3_vfs,
}

/// The files whose content must survive. All others are temporary: SQLite does not look for them after a restart.
const LASTING: c_int =
    ffi::SQLITE_OPEN_MAIN_DB | ffi::SQLITE_OPEN_WAL | ffi::SQLITE_OPEN_MAIN_JOURNAL | ffi::SQLITE_OPEN_SUPER_JOURNAL;

/// The files with whose first sync the unix VFS syncs the directory, if the handle was opened with
/// `SQLITE_OPEN_CREATE`.
const DIRECTORY_SYNCING: c_int = ffi::SQLITE_OPEN_WAL | ffi::SQLITE_OPEN_MAIN_JOURNAL | ffi::SQLITE_OPEN_SUPER_JOURNAL;

/// Registers `machine` under `name`.
///
/// # Panics
/// If SQLite refuses. There is no test without it.
#[expect(clippy::panic, reason = "the documented panic of PowerLoss::register")]
pub(crate) fn register(name: &str, machine: Arc<Machine>) {
    // SAFETY: the name is a C string; sqlite3_vfs_find initialises SQLite if nobody has yet, and is thread-safe.
    let base = unsafe { ffi::sqlite3_vfs_find(c"unix".as_ptr()) };
    let Some(name) = CString::new(name).ok().filter(|_| !base.is_null()) else {
        panic!("SQLite has no VFS called unix to wrap");
    };
    // SAFETY: SQLite never frees its built-in VFS, and nobody changes the fields read here.
    let (max_pathname, version) = unsafe { ((*base).mxPathname, (*base).iVersion) };
    let context = Box::leak(Box::new(Context { machine, base }));
    let vfs = Box::leak(Box::new(ffi::sqlite3_vfs {
        iVersion: version.min(2), // 3 adds the table of system calls, which belongs to the wrapped VFS
        szOsFile: size_of::<OpenFile>() as c_int,
        mxPathname: max_pathname,
        pNext: std::ptr::null_mut(),
        zName: name.into_raw(),
        pAppData: std::ptr::from_mut(context).cast(),
        xOpen: Some(x_open),
        xDelete: Some(x_delete),
        xAccess: Some(x_access),
        xFullPathname: Some(x_full_pathname),
        xDlOpen: Some(x_dl_open),
        xDlError: Some(x_dl_error),
        xDlSym: Some(x_dl_sym),
        xDlClose: Some(x_dl_close),
        xRandomness: Some(x_randomness),
        xSleep: Some(x_sleep),
        xCurrentTime: Some(x_current_time),
        xGetLastError: Some(x_get_last_error),
        xCurrentTimeInt64: Some(x_current_time_int64),
        xSetSystemCall: None,
        xGetSystemCall: None,
        xNextSystemCall: None,
    }));
    // SAFETY: the table and all it points to are leaked, as SQLite requires, and it is not made the default.
    let code = unsafe { ffi::sqlite3_vfs_register(vfs, 0) };
    assert_eq!(code, ffi::SQLITE_OK, "SQLite refused to register the power-loss VFS");
}

/// The context of a VFS that SQLite hands to one of the functions below.
///
/// # Safety
/// `vfs` must be a table made by [`register`].
unsafe fn context<'a>(vfs: *mut ffi::sqlite3_vfs) -> &'a Context {
    // SAFETY: register put a leaked Context there, and nobody ever writes to it.
    unsafe { &*(*vfs).pAppData.cast::<Context>() }
}

/// The path in a C string from SQLite, or none for a null pointer.
///
/// # Safety
/// `name` must be null or a C string that lives as long as the result is used.
unsafe fn path<'a>(name: *const c_char) -> Option<&'a Path> {
    if name.is_null() {
        return None;
    }
    // SAFETY: not null, and a C string by this function's contract.
    let name = unsafe { CStr::from_ptr(name) };
    Some(Path::new(OsStr::from_bytes(name.to_bytes())))
}

/// `SQLITE_OK`, or the error.
fn code(result: Result<(), Code>) -> c_int {
    result.err().unwrap_or(ffi::SQLITE_OK)
}

/// The result of a SQLite code.
fn result(code: c_int) -> Result<(), Code> {
    if code == ffi::SQLITE_OK { Ok(()) } else { Err(code) }
}

unsafe extern "C" fn x_open(
    vfs: *mut ffi::sqlite3_vfs,
    name: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite calls this with the table that register made.
    let context = unsafe { context(vfs) };
    // SAFETY: SQLite gives szOsFile bytes at `file`, aligned for any type, for us to fill.
    unsafe { (*file).pMethods = std::ptr::null() };
    // SAFETY: the name is null or a C string that SQLite keeps until xClose.
    let path = unsafe { path(name) };
    // SAFETY: the wrapped VFS lives for ever, and gets the name and the out pointer as SQLite gave them to us.
    let open = || unsafe { Real::open(context.base, name, flags, out_flags) };
    let opened = match path {
        Some(path) if flags & LASTING != 0 && flags & ffi::SQLITE_OPEN_DELETEONCLOSE == 0 => {
            let syncs_directory = flags & ffi::SQLITE_OPEN_CREATE != 0 && flags & DIRECTORY_SYNCING != 0;
            context.machine.open(path, syncs_directory, open).map(|(real, tracked)| (real, Some(tracked)))
        }
        _ if context.machine.is_dead() => Err(ffi::SQLITE_IOERR),
        _ => open().map(|real| (real, None)),
    };
    match opened {
        Ok((real, tracked)) => {
            let handle = Handle::new(Arc::clone(&context.machine), real, tracked);
            // SAFETY: `file` has room for an OpenFile, as szOsFile says, and nothing in it needs dropping.
            unsafe { file.cast::<OpenFile>().write(OpenFile::new(handle)) };
            ffi::SQLITE_OK
        }
        Err(code) => code,
    }
}

unsafe extern "C" fn x_delete(vfs: *mut ffi::sqlite3_vfs, name: *const c_char, sync_directory: c_int) -> c_int {
    // SAFETY: SQLite calls this with the table that register made.
    let context = unsafe { context(vfs) };
    // SAFETY: the name is a C string during this call.
    let Some(path) = (unsafe { path(name) }) else { return ffi::SQLITE_IOERR_DELETE };
    let delete = || {
        // SAFETY: the wrapped VFS, its own pointer and the name as given. The directory is synced in the model only.
        result(unsafe { (*context.base).xDelete.map_or(ffi::SQLITE_IOERR_DELETE, |x| x(context.base, name, 0)) })
    };
    code(context.machine.delete(path, sync_directory & 1 != 0, delete))
}

unsafe extern "C" fn x_access(vfs: *mut ffi::sqlite3_vfs, name: *const c_char, flags: c_int, out: *mut c_int) -> c_int {
    // SAFETY: SQLite calls this with the table that register made.
    let context = unsafe { context(vfs) };
    if context.machine.is_dead() {
        return ffi::SQLITE_IOERR_ACCESS;
    }
    // SAFETY: forwards SQLite's own arguments to the wrapped VFS.
    unsafe { (*context.base).xAccess.map_or(ffi::SQLITE_IOERR_ACCESS, |x| x(context.base, name, flags, out)) }
}

/// A function that only hands its arguments on to the wrapped VFS; `$otherwise` is the answer if that has no such
/// function.
macro_rules! forward {
    ($($name:ident => $field:ident($($arg:ident: $type:ty),*) -> $output:ty, $otherwise:expr;)*) => {$(
        unsafe extern "C" fn $name(vfs: *mut ffi::sqlite3_vfs, $($arg: $type),*) -> $output {
            // SAFETY: SQLite calls this with the table that register made.
            let base = unsafe { context(vfs) }.base;
            // SAFETY: forwards SQLite's own arguments to the wrapped VFS, with its own pointer.
            unsafe { (*base).$field.map_or($otherwise, |x| x(base, $($arg),*)) }
        }
    )*};
}

/// What `xDlSym` answers: an entry point of a loaded extension.
type Symbol = Option<unsafe extern "C" fn(*mut ffi::sqlite3_vfs, *mut c_void, *const c_char)>;

forward! {
    x_full_pathname => xFullPathname(name: *const c_char, len: c_int, out: *mut c_char) -> c_int, ffi::SQLITE_CANTOPEN;
    x_dl_open => xDlOpen(name: *const c_char) -> *mut c_void, std::ptr::null_mut();
    x_dl_error => xDlError(len: c_int, out: *mut c_char) -> (), ();
    x_dl_sym => xDlSym(library: *mut c_void, name: *const c_char) -> Symbol, None;
    x_dl_close => xDlClose(library: *mut c_void) -> (), ();
    x_randomness => xRandomness(len: c_int, out: *mut c_char) -> c_int, 0;
    x_sleep => xSleep(microseconds: c_int) -> c_int, 0;
    x_current_time => xCurrentTime(out: *mut f64) -> c_int, ffi::SQLITE_ERROR;
    x_get_last_error => xGetLastError(len: c_int, out: *mut c_char) -> c_int, 0;
    x_current_time_int64 => xCurrentTimeInt64(out: *mut ffi::sqlite3_int64) -> c_int, ffi::SQLITE_ERROR;
}
