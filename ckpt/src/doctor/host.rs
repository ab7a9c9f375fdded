//! What the host's kernel lets a QEMU do.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cdp_store::CheckpointMode;

use super::{Check, MODES};

const HOT: [CheckpointMode; 1] = [CheckpointMode::Hot];
/// Numbers of capabilities (capabilities(7)).
const CAP_DAC_OVERRIDE: u32 = 1;
const CAP_SYS_PTRACE: u32 = 19;
/// The first Linux whose userfaultfd write-protects shared memory (userfaultfd(2)).
const SHARED_SINCE: (u32, u32) = (5, 19);
/// Where QEMU looks for userfaultfd before it tries the system call (util/userfaultfd.c).
const DEVICE: &str = "/dev/userfaultfd";
const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// Who a process is, as far as its rights go: `/proc/PID/status` (proc(5)).
#[derive(Debug, Default, PartialEq, Eq)]
struct Rights {
    uid: u32,
    groups: Vec<u32>,
    capabilities: u64,
    filtered: bool,
}

impl Rights {
    fn parse(status: &str) -> Option<Self> {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        // Real, effective, saved, of the file system: the second decides.
        let effective = |text: &str| text.split_ascii_whitespace().nth(1)?.parse::<u32>().ok();
        let mut groups: Vec<u32> = field("Groups")?.split_ascii_whitespace().flat_map(str::parse).collect();
        groups.push(effective(field("Gid")?)?);
        Some(Self {
            uid: effective(field("Uid")?)?,
            groups,
            capabilities: u64::from_str_radix(field("CapEff")?.trim(), 16).ok()?,
            filtered: field("Seccomp").is_some_and(|text| text.trim() == "2"),
        })
    }

    fn has(&self, capability: u32) -> bool {
        self.capabilities & (1 << capability) != 0
    }

    /// Whether it may open a file of this owner, group and mode for reading and writing.
    fn may_open(&self, uid: u32, gid: u32, mode: u32) -> bool {
        let shift = match () {
            () if self.uid == uid => 6,
            () if self.groups.contains(&gid) => 3,
            () => 0,
        };
        self.has(CAP_DAC_OVERRIDE) || (mode >> shift) & 0o6 == 0o6
    }
}

/// Looks at the process of a QEMU, which connects to sockets that are made in `directory` for this process's user.
#[must_use]
pub fn of_process(pid: i32, directory: &Path) -> Vec<Check> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"));
    let Some(rights) = status.ok().as_deref().and_then(Rights::parse) else {
        let cure = "run cdpd in QEMU's PID namespace";
        return vec![Check::unknown("QEMU's rights", format!("process {pid} cannot be looked at"), cure)];
    };
    let label = fs::read(format!("/proc/{pid}/attr/current")).unwrap_or_default();
    let label = String::from_utf8_lossy(&label);
    let mut checks = vec![user(&rights, directory), kernel(), userfaultfd(&rights)];
    checks.extend(seccomp(&rights));
    checks.extend(confinement(label.trim_end_matches(['\0', '\n']), directory));
    checks
}

/// Memory arrives on a socket that only this process's user may connect to.
fn user(rights: &Rights, directory: &Path) -> Check {
    let ours = rustix::process::geteuid().as_raw();
    if rights.uid == ours || rights.has(CAP_DAC_OVERRIDE) {
        return Check::ok("user", format!("QEMU (uid {}) may connect to us", rights.uid));
    }
    let found = format!(
        "QEMU runs as uid {} and cdpd as uid {ours}: it may not connect to our sockets in {}",
        rights.uid,
        directory.display()
    );
    Check::in_the_way(&MODES, "user", found, "run both as the same user")
}

fn kernel() -> Check {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= SHARED_SINCE {
        return Check::ok("kernel", format!("Linux {release} write-protects shared memory"));
    }
    let found = format!(
        "Linux {release}: shared memory is write-protected since {}.{}",
        SHARED_SINCE.0, SHARED_SINCE.1
    );
    Check::unknown(
        "kernel",
        found,
        "use a newer kernel, or --mode live or pause, if hot checkpoints are refused",
    )
}

/// QEMU protects its memory with userfaultfd, kernel faults included, which not everybody may.
fn userfaultfd(rights: &Rights) -> Check {
    let device = fs::metadata(DEVICE).is_ok_and(|file| rights.may_open(file.uid(), file.gid(), file.mode()));
    // Linux before 5.2 has no such switch, and lets everybody.
    let open = fs::read_to_string(SYSCTL).map_or(true, |text| text.trim() != "0");
    let by = match () {
        () if rights.has(CAP_SYS_PTRACE) => "it has CAP_SYS_PTRACE",
        () if open => "vm.unprivileged_userfaultfd is 1",
        () if device => "it may open /dev/userfaultfd",
        () => {
            let found = format!("QEMU (uid {}) may not use it to protect its memory", rights.uid);
            let cure =
                "sysctl vm.unprivileged_userfaultfd=1, or let its user read and write /dev/userfaultfd";
            return Check::in_the_way(&HOT, "userfaultfd", found, cure);
        }
    };
    Check::ok("userfaultfd", format!("QEMU may use it: {by}"))
}

fn seccomp(rights: &Rights) -> Option<Check> {
    let found = "QEMU runs under a filter of system calls";
    let cure = "if hot checkpoints are refused, allow it userfaultfd (QEMU's own -sandbox does)";
    rights.filtered.then(|| Check::unknown("seccomp", found, cure))
}

/// AppArmor says `profile (mode)` or `unconfined`, SELinux `user:role:type:level`.
fn confinement(label: &str, directory: &Path) -> Option<Check> {
    let directory = directory.display();
    if label.is_empty() || label == "unconfined" || label.contains(":unconfined_t:") {
        return None;
    }
    if let Some(kind) = label.split(':').nth(2).filter(|_| !label.contains(' ')) {
        let cure = format!(
            "if QEMU's connections to {directory} fail: ausearch -m avc -c qemu | audit2allow -M cdpd && semodule -i cdpd.pp"
        );
        return Some(Check::unknown("SELinux", format!("QEMU is confined as {kind}"), cure));
    }
    let cure = format!(
        "if QEMU's connections to {directory} fail, add to its profile (libvirt: \
         /etc/apparmor.d/local/abstractions/libvirt-qemu): {directory}/*.sock rw,"
    );
    Some(Check::unknown("AppArmor", format!("QEMU is confined by {label}"), cure))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::doctor::Verdict;

    fn rights(uid: u32, capabilities: u64) -> Rights {
        Rights { uid, groups: vec![uid], capabilities, filtered: false }
    }

    #[test]
    fn rights_are_read_from_a_status_file() {
        let status = "Name:\tqemu\nUid:\t1\t64055\t1\t1\nGid:\t2\t108\t2\t2\nGroups:\t5 6 \n\
                      CapEff:\t0000000000080000\nSeccomp:\t2\n";
        let found = Rights::parse(status).unwrap();
        assert_eq!((found.uid, found.groups.as_slice()), (64055, [5, 6, 108].as_slice()));
        assert!(found.has(CAP_SYS_PTRACE) && !found.has(CAP_DAC_OVERRIDE) && found.filtered);
        assert_eq!(Rights::parse("Uid:\tx"), None);
    }

    #[test]
    fn a_file_is_open_to_its_owner_its_group_and_others_as_the_mode_says() {
        assert!(rights(5, 0).may_open(5, 0, 0o600));
        assert!(!rights(5, 0).may_open(0, 0, 0o600));
        assert!(rights(5, 0).may_open(0, 5, 0o660));
        assert!(!rights(5, 0).may_open(5, 0, 0o066), "the owner's bits hold for the owner");
        assert!(rights(5, 1 << CAP_DAC_OVERRIDE).may_open(0, 0, 0o600));
    }

    #[test]
    fn a_confined_qemu_is_told_what_to_allow() {
        let directory = Path::new("/srv/cdp");
        assert_eq!(confinement("", directory), None);
        assert_eq!(confinement("unconfined", directory), None);
        assert_eq!(confinement("unconfined_u:unconfined_r:unconfined_t:s0", directory), None);
        let check = confinement("libvirt-1b2 (enforce)", directory).unwrap();
        assert!(check.subject == "AppArmor" && check.cure.unwrap().contains("/srv/cdp/*.sock rw,"));
        let check = confinement("system_u:system_r:svirt_t:s0:c1,c2", directory).unwrap();
        assert!(check.subject == "SELinux" && check.found.contains("svirt_t"));
    }

    #[test]
    fn a_qemu_of_another_user_cannot_connect() {
        let ours = rustix::process::geteuid().as_raw();
        assert_eq!(user(&rights(ours, 0), Path::new("/x")).verdict, Verdict::Ok);
        let check = user(&rights(ours + 1, 0), Path::new("/x"));
        assert_eq!((check.verdict, check.hinders.as_slice()), (Verdict::InTheWay, MODES.as_slice()));
    }

    #[test]
    fn this_process_can_be_looked_at_and_a_dead_one_not() {
        let own = of_process(std::process::id() as i32, Path::new("/x"));
        assert!(own.iter().any(|check| check.subject == "userfaultfd"), "{own:?}");
        assert_eq!(of_process(i32::MAX, Path::new("/x"))[0].verdict, Verdict::Unknown);
    }
}
