//! What the process used: CPU time, bytes written, memory. And the machine it ran on.
//!
//! What an operating system does not tell is `None`, and its figure is left out.

use std::{
    fs,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// CPU time and bytes written since the process began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// User and system time of all threads.
    pub(crate) cpu: Duration,
    /// Bytes that were sent to the storage layer: pages made dirty, each time anew.
    pub(crate) written: Option<u64>,
}

impl Usage {
    pub(crate) fn now() -> Self {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        let cpu = Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0));
        Usage { cpu, written: field("/proc/self/io", "write_bytes:") }
    }

    pub(crate) fn since(&self, earlier: &Usage) -> Usage {
        Usage {
            cpu: self.cpu.saturating_sub(earlier.cpu),
            written: self.written.zip(earlier.written).map(|(now, then)| now.saturating_sub(then)),
        }
    }
}

/// Bytes of memory in use now.
pub(crate) fn resident_bytes() -> Option<u64> {
    Some(field("/proc/self/status", "VmRSS:")? * 1024)
}

/// The most bytes of memory in use since [`forget_peak`].
pub(crate) fn peak_resident_bytes() -> Option<u64> {
    Some(field("/proc/self/status", "VmHWM:")? * 1024)
}

/// Starts the peak anew. Source: proc_pid_clear_refs(5), the value 5. Where that is refused the peak is that of the process.
pub(crate) fn forget_peak() {
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// The number behind `name` in a file of lines.
fn field(file: &str, name: &str) -> Option<u64> {
    let content = fs::read_to_string(file).ok()?;
    content.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

/// Bytes of all files below `directory`.
pub(crate) fn disk_bytes(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { disk_bytes(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}

/// The median time of writing 4 KiB to the end of a file and syncing it, in milliseconds: what the disk gives at that moment.
/// Disks of virtual machines are throttled after a burst, by a factor of ten and more.
pub(crate) fn disk_sync_p50_ms(directory: &Path) -> Result<f64> {
    let path = directory.join("sync-probe");
    let mut file = fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    let mut times = Vec::new();
    for _ in 0..32 {
        let start = Instant::now();
        file.write_all(&[0x5a; 4096])?;
        file.sync_data()?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    drop(file);
    fs::remove_file(&path)?;
    Ok(crate::frame::median(times))
}

/// The machine.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_mib: u64,
    pub(crate) kernel: String,
    pub(crate) filesystem: String,
    pub(crate) sqlite: String,
}

impl Machine {
    /// This machine, with the file system of `directory`.
    pub(crate) fn this(directory: &Path) -> Self {
        let line = |file: &str, name: &str| {
            let content = fs::read_to_string(file).ok()?;
            let line = content.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':').map_or(line, |(_, value)| value).trim().to_owned())
        };
        Machine {
            cpu: line("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: field("/proc/meminfo", "MemTotal:").unwrap_or(0) / 1024,
            kernel: line("/proc/sys/kernel/osrelease", "").unwrap_or_else(|| std::env::consts::OS.to_owned()),
            filesystem: filesystem(directory).unwrap_or_else(|| "unknown".to_owned()),
            sqlite: rusqlite::version().to_owned(),
        }
    }
}

/// Whether files on it are no files on a disk.
pub(crate) fn is_memory(filesystem: &str) -> bool {
    matches!(filesystem, "tmpfs" | "ramfs")
}

/// The type of the file system that `directory` is on: that of the longest mount point above it.
fn filesystem(directory: &Path) -> Option<String> {
    let directory = directory.canonicalize().ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next().zip(fields.next())
    });
    // The last of those with the same mount point covers the others.
    let above = mounts.filter(|(point, _)| directory.starts_with(point)).max_by_key(|(point, _)| point.len());
    above.map(|(_, kind)| kind.to_owned())
}
