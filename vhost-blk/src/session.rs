//! One front end's connection: what it has negotiated and set up, and what its messages do to the rings.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cdp_types::{BlockDevice, RingStop, VmControl};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
};

use crate::config::ServerConfig;
use crate::config_space::{self, WRITEBACK_OFFSET};
use crate::eventfd::EventFd;
use crate::features::{self, Features};
use crate::guard::Guard;
use crate::guest::{DirtyLog, MAX_REGIONS, MemoryMap, RegionSpec, RingAddresses, RingFault};
use crate::inflight::{History, InflightRegion, region_len};
use crate::queue::{Context, tell_of_other_history};
use crate::rings::Rings;
use crate::stats::ServerCounters;
use crate::write_cache::WriteCache;

/// How long rings go on with memory that the front end has taken back. It may give it again at once, in other regions, one
/// by one: QEMU does so while rings run, when the guest moves what lies next to its memory. A host that is busy may keep QEMU
/// from the processor between two of its messages, and a ring whose memory is given up stands still until the guest resets.
const RETAINED: Duration = Duration::from_secs(2);

/// What stays the same from connection to connection.
pub(crate) struct Disk {
    pub(crate) config: ServerConfig,
    pub(crate) name: Arc<str>,
    pub(crate) device: Arc<dyn BlockDevice>,
    pub(crate) vm: Arc<dyn VmControl>,
    pub(crate) guard: Arc<Guard>,
    pub(crate) counters: ServerCounters,
    pub(crate) write_cache: Arc<WriteCache>,
}

/// The state of a connection. Every message is a method of [`VhostUserBackendReqHandlerMut`].
pub(crate) struct Session {
    disk: Arc<Disk>,
    features: Features,
    protocol: VhostUserProtocolFeatures,
    /// As the front end has it.
    memory: Arc<MemoryMap>,
    /// What the rings still go on with, and until when, after some of it was taken back.
    retained: Option<(Arc<MemoryMap>, Instant)>,
    /// As the front end has sent it; in use only while LOG_ALL is negotiated.
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<InflightRegion>>,
    history: History,
    rings: Rings,
    /// Nothing was said yet of a guest that runs: a new machine may begin.
    may_begin: bool,
    /// Why the last message was refused.
    refusal: Option<String>,
}

impl Session {
    pub(crate) fn new(disk: Arc<Disk>) -> Self {
        let context = |index| Context {
            index,
            name: Arc::clone(&disk.name),
            disk: Arc::clone(&disk.device),
            counters: Arc::clone(&disk.counters.queues[usize::from(index)]),
            busy_poll: disk.config.busy_poll,
            queue_bytes: disk.config.queue_bytes,
            guard: Arc::clone(&disk.guard),
        };
        Self {
            rings: Rings::new((0..disk.config.queues).map(context).collect(), &disk),
            disk,
            features: Features::default(),
            protocol: VhostUserProtocolFeatures::empty(),
            memory: Arc::default(),
            retained: None,
            log: None,
            inflight: None,
            history: History::Ours,
            may_begin: true,
            refusal: None,
        }
    }

    /// The front end has been told to read the configuration again.
    pub(crate) fn told_of_change(&mut self) {
        self.may_begin = false;
    }

    /// Why the last message was refused, if it was refused by us.
    pub(crate) fn take_refusal(&mut self) -> Option<String> {
        self.refusal.take()
    }

    /// Whether the front end has accepted a protocol feature.
    pub(crate) fn negotiated(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol.contains(feature)
    }

    /// Whether messages that ask for it are acknowledged.
    pub(crate) fn reply_ack(&self) -> bool {
        self.negotiated(VhostUserProtocolFeatures::REPLY_ACK)
    }

    pub(crate) fn any_running(&self) -> bool {
        self.rings.any_running()
    }

    /// Ends the connection: nothing is in flight, and no thread is left, when this returns. While the front end is
    /// `there`, everything is reported to the guest first.
    pub(crate) fn end(&mut self, there: bool) {
        if there {
            self.rings.pause();
        }
        self.rings.leave();
        self.disk.guard.disconnected();
        self.disk.vm.disconnected(&self.disk.config.socket);
    }

    fn refuse<T>(&mut self, why: impl Into<String>) -> Result<T> {
        let why = why.into();
        let error = Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, why.clone()));
        self.refusal = Some(why);
        Err(error)
    }

    fn active_log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref().filter(|_| self.features.log_all())
    }

    /// The log that rings write to now. While none runs, it may be that of an earlier migration: QEMU says first that writes
    /// are logged, and what memory there is, and sends the log that fits later. Rings wait for it.
    fn log_in_use(&self) -> Option<&Arc<DirtyLog>> {
        self.active_log().filter(|_| self.rings.any_running())
    }

    /// Lets the rings go on with what has changed.
    fn spread(&mut self) {
        self.rings.memory = Arc::clone(self.retained.as_ref().map_or(&self.memory, |(memory, _)| memory));
        self.rings.log = self.active_log().map(Arc::clone);
        self.rings.features = self.features;
        self.rings.inflight = self.inflight.clone();
        self.rings.refuse = self.history == History::Foreign;
        self.rings.rewire();
    }

    fn change_memory(&mut self, memory: MemoryMap) -> Result<()> {
        self.set_memory(memory)?;
        self.use_memory();
        Ok(())
    }

    fn set_memory(&mut self, memory: MemoryMap) -> Result<()> {
        // A page that the log has no bit for would be lost by the migration, without anyone noticing.
        if self.log_in_use().is_some_and(|log| !log.covers(memory.end())) {
            return self.refuse("the memory goes on past the end of the dirty log");
        }
        self.memory = Arc::new(memory);
        Ok(())
    }

    /// Lets the rings go on with the memory as the front end has it.
    fn use_memory(&mut self) {
        self.retained = None;
        self.disk.guard.set_memory(&self.memory);
        self.spread();
        self.disk.vm.memory_changed(&self.disk.config.socket);
    }

    /// Lets the rings go on with what they retain, and with what was given beside it, or instead of a part of it: the guest
    /// may use that at once.
    fn retain_with_new(&mut self) {
        let Some((used, until)) = &mut self.retained else { return };
        // The front end is at it.
        *until = Instant::now() + RETAINED;
        if let Some(more) = used.with_new_of(&self.memory) {
            *used = Arc::new(more);
            self.disk.guard.set_memory(used);
            self.spread();
        }
    }

    /// How long the rings still go on with memory that was taken back, and not given again.
    pub(crate) fn retains_for(&self) -> Option<Duration> {
        self.retained.as_ref().map(|(_, until)| until.saturating_duration_since(Instant::now()))
    }

    /// Gives memory up that was taken back, if it is time.
    pub(crate) fn release_memory(&mut self) {
        if self.retains_for().is_some_and(|left| left.is_zero()) {
            self.use_memory();
        }
    }

    /// Gives it up at once, because no ring runs any more.
    fn release_unused_memory(&mut self) {
        if self.retained.is_some() && !self.rings.any_running() {
            self.use_memory();
        }
    }

    fn check_log(&mut self, log: &DirtyLog) -> Result<()> {
        let end = self.memory.end().max(self.rings.memory.end()).max(self.rings.used_log_end());
        if log.covers(end) { Ok(()) } else { self.refuse("the dirty log is shorter than the memory") }
    }

    fn check_ring(&mut self, index: u32) -> Result<u16> {
        match u16::try_from(index).ok().filter(|&index| index < self.disk.config.queues) {
            Some(index) => Ok(index),
            None => self.refuse(format!("there is no ring {index}")),
        }
    }

    fn check_stopped(&mut self, index: u32) -> Result<u16> {
        let index = self.check_ring(index)?;
        if self.rings.running(index) { self.refuse(format!("ring {index} is running")) } else { Ok(index) }
    }

    fn eventfd(&mut self, file: Option<File>) -> Result<Option<EventFd>> {
        match file.map(EventFd::from_front_end).transpose() {
            Ok(eventfd) => Ok(eventfd),
            Err(error) => self.refuse(error.to_string()),
        }
    }

    fn not_offered<T>(&mut self, what: &str) -> Result<T> {
        self.refuse(format!("{what} was not offered"))
    }
}

/// No refusal, which the front end could live with, but the end of the connection: it must not go on believing that
/// nothing is in flight.
fn not_drained(fault: RingFault) -> Error {
    Error::ReqHandlerError(io::Error::other(format!("a ring cannot be drained: {fault}")))
}

fn spec(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest: region.guest_phys_addr,
        len: region.memory_size,
        user: region.user_addr,
        offset: region.mmap_offset,
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated; the specification recommends to ignore it.
    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.rings.reset().map_err(not_drained)?;
        self.release_unused_memory();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(features::offered(&self.disk.device.info()))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !features::offered(&self.disk.device.info());
        if unknown != 0 {
            return self.refuse(format!("features {unknown:#x} were not offered"));
        }
        let features = Features(features);
        if self.rings.any_running() && features.fixed() != self.features.fixed() {
            return self.refuse("features cannot change while a ring runs");
        }
        let used = features.log_all() && self.rings.any_running();
        if let Some(log) = self.log.clone().filter(|_| used) {
            self.check_log(&log)?;
        }
        self.features = features;
        self.spread();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let table = regions.iter().zip(files).try_fold(MemoryMap::default(), |map, (region, file)| {
            map.with(spec(region), file).map_err(|error| (spec(region), error))
        });
        match table {
            Ok(table) => self.change_memory(table).map(|()| None),
            Err((region, error)) => self.refuse(format!("the memory region {region:x?} is refused: {error}")),
        }
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let index = self.check_stopped(index)?;
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two());
        match size.filter(|&size| size <= self.disk.config.max_queue_size) {
            Some(size) => self.rings.set_size(index, size),
            None => return self.refuse(format!("a ring of {num} entries is not accepted")),
        }
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let index = self.check_ring(index)?;
        let used_log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let addresses = RingAddresses { descriptors, available, used, used_log };
        let end = addresses.used_log_end(self.rings.size(index));
        if self.log_in_use().is_some_and(|log| !log.covers(end)) {
            return self.refuse("the used ring is logged past the end of the dirty log");
        }
        self.rings.set_addresses(index, addresses);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let index = self.check_stopped(index)?;
        match u16::try_from(base) {
            Ok(base) => self.rings.set_base(index, base),
            Err(_) => return self.refuse(format!("{base} is no position of a split ring")),
        }
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.check_ring(index)?;
        let base = self.rings.stop(ring, RingStop::Asked).map_err(not_drained)?;
        self.release_unused_memory();
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.check_ring(index.into())?;
        let kick = self.eventfd(fd)?;
        self.rings.set_kick(index, kick);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.check_ring(index.into())?;
        let call = self.eventfd(fd)?;
        self.rings.set_call(index, call);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let index = self.check_ring(index.into())?;
        let err = self.eventfd(fd)?;
        self.rings.set_err(index, err);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(features::offered_protocol())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        match VhostUserProtocolFeatures::from_bits(features)
            .filter(|&bits| features::offered_protocol().contains(bits))
        {
            Some(protocol) => self.protocol = protocol,
            None => {
                return self.refuse(format!("not all of the protocol features {features:#x} were offered"));
            }
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.disk.config.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let index = self.check_ring(index)?;
        self.rings.set_enabled(index, enable).map_err(not_drained)
    }

    /// A machine that begins reads all of it first, and has its write cache on unless it is expected to go on from where it
    /// was off. From then on the guest is shown what the front end has read, or what the guest itself has set, whatever we
    /// say and through all its resets: QEMU reads again only to learn of another size. So nothing else may turn the cache
    /// on.
    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let is_read = (offset..offset.saturating_add(size)).contains(&WRITEBACK_OFFSET);
        if is_read && self.may_begin && !self.rings.any_running() {
            self.disk.write_cache.begin();
        }
        let writeback = !self.disk.write_cache.is_off();
        Ok(config_space::read(&self.disk.device.info(), self.disk.config.queues, writeback, offset, size))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        match (offset, bytes) {
            (WRITEBACK_OFFSET, [writeback @ (0 | 1)]) if !self.disk.device.info().read_only => {
                self.may_begin = false;
                let off = *writeback == 0;
                self.disk.write_cache.set_off(off);
                if let Some(region) = &self.inflight {
                    region.set_write_through(off);
                }
                Ok(())
            }
            _ => self.refuse("only the write cache can be configured, by 0 or 1"),
        }
    }

    /// The connection takes this message itself (`back_channel`), because a `Backend` can neither tell of a changed
    /// configuration nor give its socket away.
    fn set_backend_req_fd(&mut self, _backend: Backend) {}

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let VhostUserInflight { num_queues, queue_size, .. } = *asked;
        if num_queues > self.disk.config.queues || queue_size > self.disk.config.max_queue_size {
            return self
                .refuse(format!("{num_queues} rings of {queue_size} entries are more than there can be"));
        }
        let write_through = self.disk.write_cache.is_off();
        if write_through {
            tracing::info!(
                socket = %self.disk.name,
                "the guest has its write cache turned off, or may have: each write is made durable before it is answered"
            );
        }
        match InflightRegion::create(num_queues, queue_size, &self.disk.device.identity(), write_through) {
            Ok(file) => Ok((
                VhostUserInflight::new(region_len(num_queues, queue_size), 0, num_queues, queue_size),
                file,
            )),
            Err(error) => self.refuse(format!("no in-flight region can be made: {error}")),
        }
    }

    fn set_inflight_fd(&mut self, region: &VhostUserInflight, file: File) -> Result<()> {
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *region;
        if self.rings.any_running() {
            return self.refuse("the in-flight region cannot change while a ring runs");
        }
        let region = match InflightRegion::map(file, mmap_offset, mmap_size, num_queues, queue_size) {
            Ok(region) => Arc::new(region),
            Err(error) => return self.refuse(format!("the in-flight region cannot be used: {error}")),
        };
        self.history = region.claim(&self.disk.device.identity());
        if self.history == History::Foreign {
            tell_of_other_history(&self.disk.name);
        }
        self.may_begin = false;
        self.disk.write_cache.set_off(region.write_through());
        self.inflight = Some(region);
        self.spread();
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let spec = spec(region);
        let bad_len = spec.len == 0
            || spec.guest.checked_add(spec.len).is_none()
            || spec.user.checked_add(spec.len).is_none();
        if bad_len {
            return self.refuse(format!("the memory region {spec:x?} is refused: its bounds overflow"));
        }
        match self.memory.with(spec, file) {
            Ok(memory) => {
                let more_to_come = self.retained.as_ref().is_some_and(|(used, _)| !memory.has_all_of(used));
                if more_to_come {
                    self.set_memory(memory)?;
                    self.retain_with_new();
                } else {
                    self.change_memory(memory)?
                }
                Ok(None)
            }
            Err(error) => self.refuse(format!("the memory region {spec:x?} is refused: {error}")),
        }
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        match self.memory.without(spec(region)) {
            Ok(memory) if self.rings.any_running() => {
                let used = Arc::clone(&self.rings.memory);
                self.memory = Arc::new(memory);
                self.retained = Some((used, Instant::now() + RETAINED));
                Ok(())
            }
            Ok(memory) => self.change_memory(memory),
            Err(error) => self.refuse(format!("the memory region {:x?} stays: {error}", spec(region))),
        }
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let VhostUserLog { mmap_size, mmap_offset } = *log;
        let log = match DirtyLog::map(file, mmap_offset, mmap_size) {
            Ok(log) => Arc::new(log),
            Err(error) => return self.refuse(format!("the dirty log cannot be used: {error}")),
        };
        if self.retained.is_some() {
            // It need not have room for what was taken back.
            self.use_memory();
        }
        if self.features.log_all() {
            self.check_log(&log)?;
        }
        self.log = Some(log);
        self.spread();
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        self.not_offered("a GPU socket")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        self.not_offered("a shared object")
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        self.not_offered("the transfer of device state")
    }

    fn check_device_state(&mut self) -> Result<()> {
        self.not_offered("the transfer of device state")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        self.not_offered("shared memory of the device")
    }
}
