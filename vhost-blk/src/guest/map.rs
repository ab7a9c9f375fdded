//! Which memory the front end has shared, and where it is mapped (vhost-user, "Memory access").

use std::fmt;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;

use crate::guard::{PAGE, Page, RegionGuard};

/// Regions that a front end may add; as many as the kernel's vhost takes by default.
pub(crate) const MAX_REGIONS: usize = 509;

/// A region as the front end describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RegionSpec {
    /// Its first guest-physical address.
    pub(crate) guest: u64,
    /// Its length, in bytes.
    pub(crate) len: u64,
    /// Where the front end has mapped it.
    pub(crate) user: u64,
    /// Where it begins in its file, in bytes.
    pub(crate) offset: u64,
}

impl RegionSpec {
    /// Whether they have addresses in common, of the guest's or of the front end's.
    fn overlaps(&self, other: &Self) -> bool {
        self.meets(other, |spec| spec.guest) || self.meets(other, |spec| spec.user)
    }

    /// Whether they have addresses in common, of those of which `first` is the first one.
    fn meets(&self, other: &Self, first: impl Fn(&Self) -> u64) -> bool {
        let (a, b) = (first(self), first(other));
        a < b.saturating_add(other.len) && b < a.saturating_add(self.len)
    }
}

/// Why a region is refused.
#[derive(Debug)]
pub(crate) enum MapError {
    /// It overlaps another, in guest or in front-end addresses.
    Overlap,
    /// There are as many as can be.
    TooMany,
    /// Its file is shorter than it says.
    Short,
    /// No region is like the one that is to be removed.
    Unknown,
    /// The operating system cannot map it.
    Mapping(String),
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Overlap => f.write_str("it overlaps another region"),
            Self::TooMany => write!(f, "there are {MAX_REGIONS} regions already"),
            Self::Short => f.write_str("its file is shorter than the region"),
            Self::Unknown => f.write_str("there is no such region"),
            Self::Mapping(why) => write!(f, "it cannot be mapped: {why}"),
        }
    }
}

#[derive(Clone)]
struct Region {
    spec: RegionSpec,
    mapping: Arc<MmapRegion>,
    guard: Arc<RegionGuard>,
}

impl Region {
    fn at(&self, inside: u64) -> *mut u8 {
        self.mapping.as_ptr().wrapping_add(inside as usize)
    }

    /// Whether it is other memory at guest addresses that both have. Of what is no regular file nobody can tell.
    fn replaces(&self, old: &Self) -> bool {
        let place = |region: &Self| (region.guard.file(), region.spec.offset.wrapping_sub(region.spec.guest));
        self.guard.file().is_some()
            && self.spec.meets(&old.spec, |spec| spec.guest)
            && place(self) != place(old)
    }

    fn page(&self, index: u64, inside: u64) -> Page {
        Page { region: Arc::clone(&self.guard), mapping: Arc::clone(&self.mapping), index, inside }
    }
}

/// All memory that a front end has shared at one time. It is never changed, only replaced: requests in flight keep
/// the one that they were made with.
#[derive(Clone, Default)]
pub(crate) struct MemoryMap {
    /// In the order of guest addresses.
    regions: Vec<Region>,
}

impl MemoryMap {
    /// This map with one more region.
    pub(crate) fn with(&self, spec: RegionSpec, file: File) -> Result<Self, MapError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(MapError::TooMany);
        }
        if self.overlaps(&spec) {
            return Err(MapError::Overlap);
        }
        let (mapping, guard) = map(&spec, file)?;
        let mut map = self.clone();
        map.insert(Region { spec, mapping, guard });
        Ok(map)
    }

    fn overlaps(&self, spec: &RegionSpec) -> bool {
        self.regions.iter().any(|region| region.spec.overlaps(spec))
    }

    fn insert(&mut self, new: Region) {
        let at = self.regions.partition_point(|region| region.spec.guest < new.spec.guest);
        self.regions.insert(at, new);
    }

    /// This map without those regions for which another one has other memory, and with those of the other one that lie
    /// beside all that are left; none if that is this map. There are never more than twice as many as a front end may add.
    pub(crate) fn with_new_of(&self, other: &Self) -> Option<Self> {
        let stays = |old: &&Region| !other.regions.iter().any(|new| new.replaces(old));
        let left = Self { regions: self.regions.iter().filter(stays).cloned().collect() };
        let mut map = left.clone();
        let room = (2 * MAX_REGIONS).saturating_sub(left.regions.len());
        for region in other.regions.iter().filter(|region| !left.overlaps(&region.spec)).take(room) {
            map.insert(region.clone());
        }
        let all_stay = left.regions.len() == self.regions.len();
        (!all_stay || map.regions.len() > left.regions.len()).then_some(map)
    }

    /// This map without the region at these addresses.
    pub(crate) fn without(&self, spec: RegionSpec) -> Result<Self, MapError> {
        let same = |region: &Region| {
            let other = region.spec;
            (other.guest, other.user, other.len) == (spec.guest, spec.user, spec.len)
        };
        let at = self.regions.iter().position(same).ok_or(MapError::Unknown)?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Ok(Self { regions })
    }

    /// Whether all guest memory of another map is in this one.
    pub(crate) fn has_all_of(&self, other: &Self) -> bool {
        other.regions.iter().all(|region| self.pieces(region.spec.guest, region.spec.len, |_, _| ()))
    }

    /// Whether the front end has shared nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The first guest address after all memory.
    pub(crate) fn end(&self) -> u64 {
        self.regions.last().map_or(0, |region| region.spec.guest + region.spec.len)
    }

    /// Calls `f(base, length)` for each mapped piece of guest memory from `addr`. False if not all of it is guest
    /// memory; some pieces may have been given by then. `base` is mapped, readable and writable while `self` lives.
    pub(crate) fn pieces(&self, addr: u64, len: u64, mut f: impl FnMut(*mut u8, usize)) -> bool {
        self.walk(addr, len, |region, inside, part| f(region.at(inside), part as usize))
    }

    /// Adds the pages of guest memory from `addr` that are not touched in the present window. What is no guest memory
    /// has none.
    pub(crate) fn untouched(&self, addr: u64, len: u64, pages: &mut Vec<Page>) {
        self.walk(addr, len, |region, inside, part| {
            let untouched = region.guard.untouched(inside, part);
            pages.extend(untouched.map(|(index, inside)| region.page(index, inside)));
        });
    }

    /// As `untouched`, for bytes at the front end's address `user`. `idle` says which of the bytes, from the first up
    /// to the second one that it is given, is the best to write over itself.
    pub(crate) fn untouched_user(&self, user: u64, len: u64, idle: impl Fn(u64, u64) -> u64) -> Vec<Page> {
        let Some(region) = self.region_of_user(user, len) else { return Vec::new() };
        let start = user - region.spec.user;
        let untouched = region.guard.untouched(start, len).map(|(index, inside)| {
            let first = inside - start;
            let page_end = first + PAGE - (user + first) % PAGE;
            region.page(index, start + idle(first, page_end.min(len)))
        });
        untouched.collect()
    }

    /// All regions, as the guard sees them.
    pub(crate) fn region_guards(&self) -> Vec<Arc<RegionGuard>> {
        self.regions.iter().map(|region| Arc::clone(&region.guard)).collect()
    }

    /// Calls `f(region, offset, length)` for each piece of guest memory from `addr`, as `pieces` does.
    fn walk(&self, addr: u64, len: u64, mut f: impl FnMut(&Region, u64, u64)) -> bool {
        let (mut addr, mut left) = (addr, len);
        let mut next = self.regions.partition_point(|region| region.spec.guest <= addr);
        while left > 0 {
            let Some(region) = next.checked_sub(1).and_then(|at| self.regions.get(at)) else { return false };
            // Sorted and without overlap: `region` is the last that begins at or before `addr`.
            let inside = addr - region.spec.guest;
            if inside >= region.spec.len {
                return false;
            }
            let part = (region.spec.len - inside).min(left);
            f(region, inside, part);
            left -= part;
            match addr.checked_add(part) {
                Some(end) => addr = end,
                None => return left == 0,
            }
            next += 1;
            if left > 0 && self.regions.get(next - 1).is_none_or(|region| region.spec.guest != addr) {
                return false;
            }
        }
        true
    }

    /// Where `len` bytes at the front end's address `user` are mapped, if they lie in one region and on a multiple
    /// of `align`. Mapped, readable and writable while `self` lives.
    pub(crate) fn host_of_user(&self, user: u64, len: u64, align: usize) -> Option<*mut u8> {
        let region = self.region_of_user(user, len)?;
        let host = region.at(user - region.spec.user);
        (host as usize).is_multiple_of(align).then_some(host)
    }

    fn region_of_user(&self, user: u64, len: u64) -> Option<&Region> {
        self.regions.iter().find(|region| {
            user.checked_sub(region.spec.user)
                .is_some_and(|at| at < region.spec.len && len <= region.spec.len - at)
        })
    }

    /// Where `len` bytes at a guest address are mapped, if they are in one piece. As `host_of_user` otherwise.
    pub(crate) fn host_of_guest(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let mut whole = None;
        self.pieces(addr, len, |base, part| {
            if part as u64 == len {
                whole = Some(base);
            }
        });
        whole
    }
}

fn map(spec: &RegionSpec, file: File) -> Result<(Arc<MmapRegion>, Arc<RegionGuard>), MapError> {
    let end = spec.offset.checked_add(spec.len).ok_or(MapError::Short)?;
    let size = usize::try_from(spec.len).map_err(|_| MapError::Short)?;
    // Touching a page behind the end of its file would end this process and with it every other disk.
    let metadata = file.metadata().map_err(|error| MapError::Mapping(error.to_string()))?;
    if metadata.is_file() && metadata.len() < end {
        return Err(MapError::Short);
    }
    let identity = metadata.is_file().then(|| (metadata.dev(), metadata.ino()));
    let mapping = MmapRegion::from_file(FileOffset::new(file, spec.offset), size);
    let mapping = mapping.map_err(|error| MapError::Mapping(error.to_string()))?;
    // The guard's bitmap grows with the length, so it is made only for what could be mapped: nobody can have more of
    // that than there are addresses.
    let guard = RegionGuard::new(spec.user, spec.len, spec.offset, identity);
    Ok((Arc::new(mapping), Arc::new(guard)))
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn file(len: u64) -> File {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    /// Memory of these guest addresses and lengths; the front end maps it 2³² higher.
    pub(in crate::guest) fn memory_of(regions: &[(u64, u64)]) -> MemoryMap {
        regions.iter().fold(MemoryMap::default(), |map, &(guest, len)| {
            map.with(RegionSpec { guest, len, user: guest + (1 << 32), offset: 0 }, file(len)).unwrap()
        })
    }

    #[test]
    fn regions_that_overlap_or_leave_their_file_are_refused() {
        let map = memory_of(&[(0x1000, 0x2000)]);
        let spec = |guest, user, len, offset| RegionSpec { guest, len, user, offset };
        let fails = |spec, len| map.with(spec, file(len)).err().unwrap();
        assert!(matches!(fails(spec(0x2000, 0, 0x1000, 0), 0x1000), MapError::Overlap));
        assert!(matches!(fails(spec(0x9000, (1 << 32) + 0x1000, 0x1000, 0), 0x1000), MapError::Overlap));
        assert!(matches!(fails(spec(0x9000, 0x9000, 0x2000, 0), 0x1000), MapError::Short));
        assert!(matches!(fails(spec(0x9000, 0x9000, 0x1000, 0x1000), 0x1000), MapError::Short));
        assert!(matches!(fails(spec(0x9000, 0x9000, 0x1000, u64::MAX), 0x1000), MapError::Short));
        assert!(matches!(fails(spec(0x9000, 0x9000, 0x1000, 0x10), 0x2000), MapError::Mapping(_)));
    }

    #[test]
    fn a_removed_region_is_gone_and_the_others_stay() {
        let map = memory_of(&[(0, 0x1000), (0x1000, 0x1000), (0x8000, 0x1000)]);
        let spec = RegionSpec { guest: 0x1000, len: 0x1000, user: (1 << 32) + 0x1000, offset: 0 };
        let rest = map.without(spec).unwrap();
        assert!(map.pieces(0x800, 0x1000, |_, _| {}));
        assert!(!rest.pieces(0x800, 0x1000, |_, _| {}));
        assert!(rest.pieces(0x8000, 0x1000, |_, _| {}));
        assert!(matches!(rest.without(spec), Err(MapError::Unknown)));
        assert_eq!(rest.end(), 0x9000);
    }

    #[test]
    fn of_another_map_only_regions_that_lie_beside_all_others_are_new() {
        let memory = file(0xa000);
        let in_pieces = |pieces: &[(u64, u64)]| {
            pieces.iter().fold(MemoryMap::default(), |map, &(guest, len)| {
                let spec = RegionSpec { guest, len, user: guest + (1 << 32), offset: guest };
                map.with(spec, memory.try_clone().unwrap()).unwrap()
            })
        };
        let used = in_pieces(&[(0, 0x2000), (0x8000, 0x1000)]);
        let given = in_pieces(&[(0x1000, 0x2000), (0x4000, 0x1000), (0x9000, 0x1000)]);
        let both = used.with_new_of(&given).unwrap();
        assert!(both.has_all_of(&used));
        assert!(both.pieces(0x4000, 0x1000, |_, _| {}));
        assert!(both.pieces(0x8000, 0x2000, |_, _| {}), "in the order of addresses");
        assert!(!both.pieces(0x2000, 1, |_, _| {}), "a region that overlaps another");
        assert!(both.with_new_of(&given).is_none());

        // Other memory takes the place of what was there.
        let rest = used.with_new_of(&memory_of(&[(0x1000, 0x2000)])).unwrap();
        assert!(!rest.pieces(0, 1, |_, _| {}));
        assert!(rest.pieces(0x1000, 0x2000, |_, _| {}) && rest.pieces(0x8000, 0x1000, |_, _| {}));
    }

    #[test]
    fn memory_that_is_taken_back_again_and_again_does_not_pile_up() {
        let region = memory_of(&[(0, 0x1000)]).regions[0].clone();
        let one = |at: u64| {
            let spec = RegionSpec { guest: at * 0x1000, user: (1 << 32) + at * 0x1000, ..region.spec };
            MemoryMap { regions: vec![Region { spec, ..region.clone() }] }
        };
        let most = 2 * MAX_REGIONS as u64;
        let mut used = one(0);
        for at in 1..most {
            used = used.with_new_of(&one(at)).unwrap();
        }
        assert!(used.with_new_of(&one(most)).is_none());
    }

    #[test]
    fn ring_addresses_must_be_aligned_and_lie_in_one_region() {
        let map = memory_of(&[(0, 0x1000), (0x1000, 0x1000)]);
        let user = 1 << 32;
        assert!(map.host_of_user(user + 0xff0, 16, 16).is_some());
        assert!(map.host_of_user(user + 0xff8, 16, 8).is_none(), "crosses into the next region");
        assert!(map.host_of_user(user + 8, 16, 16).is_none(), "not aligned");
        assert!(map.host_of_user(user - 16, 16, 16).is_none());
        assert!(map.host_of_user(u64::MAX, 16, 1).is_none());
    }
}
