//! How RocksDB is set up, and why.

use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, DBCompressionType, InfoLogger, LogLevel, Options,
    SliceTransform,
};

use super::keys::NODE_PREFIX_LEN;
use super::kv::Family;

const MIB: usize = 1 << 20;

/// RocksDB's own number of levels.
const LEVELS: usize = 7;
/// Files of the map's level 0 that are compacted into the next level. Each read looks into all of them; half as many take
/// a quarter more processor time while it is written.
pub(super) const LEVEL_ZERO_FILES: i32 = 8;
/// The same while nothing is written.
pub(super) const LEVEL_ZERO_FILES_IDLE: i32 = 2;
/// So many files are worth it: each time the next level is rewritten, too.
pub(super) const WORTH_TIDYING: u64 = 4;

/// What an operator can choose about the time index's database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RocksOptions {
    /// Memory for rows that are not in a file yet and for cached blocks, filters included, in bytes. At least
    /// 8 MiB are used. Compactions need some 10 MiB beside it while they run.
    pub memory_bytes: usize,
    /// Threads for flushes and compactions together.
    pub background_threads: u16,
    /// What flushes and compactions may write per second together, in bytes; unlimited if `None`. Too low a limit
    /// stops index writes, which lengthens recovery.
    pub rate_limit_bytes_per_s: Option<u64>,
    /// Files kept open.
    pub max_open_files: u16,
}

impl Default for RocksOptions {
    fn default() -> Self {
        Self {
            memory_bytes: 48 * MIB,
            background_threads: 2,
            rate_limit_bytes_per_s: None,
            max_open_files: 256,
        }
    }
}

/// The options of one database, and its cache, whose usage is reported, with what that may hold.
pub(super) struct Tuned {
    pub(super) database: Options,
    pub(super) cache: Cache,
    pub(super) cache_bytes: usize,
    write_buffer_bytes: usize,
}

/// The time index: nothing logged, nothing overwritten, and read node by node.
pub(super) fn time_index(options: &RocksOptions) -> Tuned {
    let memory = options.memory_bytes.max(8 * MIB);
    let mut database = common();
    // A watermark must never survive without its rows.
    database.set_atomic_flush(true);
    database.set_max_background_jobs(i32::from(options.background_threads.max(2)));
    database.set_max_open_files(i32::from(options.max_open_files.max(16)));
    if let Some(limit) = options.rate_limit_bytes_per_s {
        database.set_ratelimiter(i64::try_from(limit).unwrap_or(i64::MAX), 100_000, 10);
    }
    // Up to two memtables: the one being filled and the one being flushed.
    let cache_bytes = memory / 2;
    Tuned { database, cache: Cache::new_lru_cache(cache_bytes), cache_bytes, write_buffer_bytes: memory / 4 }
}

/// The catalogue: a few thousand small rows, each write synced.
pub(super) fn catalogue() -> Tuned {
    let mut database = common();
    database.set_max_background_jobs(2);
    database.set_max_open_files(32);
    // What was synced must be found whole; a write that the power cut interrupted may be torn.
    database.set_wal_recovery_mode(rocksdb::DBRecoveryMode::TolerateCorruptedTailRecords);
    database.set_max_total_wal_size(4 * MIB as u64);
    Tuned { database, cache: Cache::new_lru_cache(MIB), cache_bytes: MIB, write_buffer_bytes: MIB }
}

/// Either, for looking at.
pub(super) fn read_only(families: &[Family]) -> Tuned {
    let mut tuned =
        if families == Family::CATALOGUE { catalogue() } else { time_index(&RocksOptions::default()) };
    tuned.database.create_if_missing(false);
    tuned.database.create_missing_column_families(false);
    tuned
}

fn common() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    // What RocksDB has to say goes where all else goes, and the directory holds nothing but the database.
    options.set_info_logger(InfoLogger::new_callback_logger(LogLevel::Warn, |level, text| match level {
        LogLevel::Error | LogLevel::Fatal => tracing::error!(target: "rocksdb", "{}", text.trim_end()),
        LogLevel::Warn => tracing::warn!(target: "rocksdb", "{}", text.trim_end()),
        // Hundreds of lines about its settings at every opening, whatever level is asked for.
        _ => tracing::trace!(target: "rocksdb", "{}", text.trim_end()),
    }));
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    // Opening must not read every file.
    options.set_skip_stats_update_on_db_open(true);
    options.set_avoid_unnecessary_blocking_io(true);
    // Small pieces to the disk at once instead of much at the end: the log's syncs have to get through between.
    options.set_bytes_per_sync(512 << 10);
    options.set_compaction_readahead_size(256 << 10);
    options
}

impl Tuned {
    /// The options of one family.
    pub(super) fn family(&self, family: Family) -> Options {
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&self.cache);
        // Filters and indexes grow with the database, so they live in the cache too, in pieces.
        table.set_cache_index_and_filter_blocks(true);
        table.set_cache_index_and_filter_blocks_with_high_priority(true);

        let mut options = Options::default();
        // Most of a row is checksums and places: zstd takes twice the processor time of a whole compaction for a tenth of the
        // bytes, on any level, and for level 0, which is soon rewritten, lz4 took two thirds of an index flush.
        // (Files are not moved from it as they are any more, which seldom was possible.)
        options.set_compression_type(DBCompressionType::Lz4);
        let mut of_levels = [DBCompressionType::Lz4; LEVELS];
        of_levels[0] = DBCompressionType::None;
        options.set_compression_per_level(&of_levels);
        match family {
            Family::Map => self.map(&mut options, &mut table),
            Family::Present => self.present(&mut options, &mut table),
            // Small beside the map, but flushed as often.
            Family::Time => options.set_write_buffer_size(self.write_buffer_bytes / 4),
            Family::Watermark | Family::Rows => options.set_write_buffer_size(MIB),
        }
        options.set_block_based_table_factory(&table);
        options
    }

    fn present(&self, options: &mut Options, table: &mut BlockBasedOptions) {
        options.set_write_buffer_size(self.write_buffer_bytes / 4);
        // A row is looked up by its whole key, and is about as long as such a block.
        table.set_block_size(4 << 10);
        in_pieces(table);
        // A row has an entry of its own in them: pieces of RocksDB's 4 KiB would be too many to have been read before.
        table.set_metadata_block_size(32 << 10);
        // All of it is in one level, and in what was written last.
        in_large_levels(options);
        options.set_level_zero_file_num_compaction_trigger(LEVEL_ZERO_FILES / 2);
    }

    fn map(&self, options: &mut Options, table: &mut BlockBasedOptions) {
        options.set_write_buffer_size(self.write_buffer_bytes);
        options.set_max_write_buffer_number(2);

        // A leaf is read as four nodes of which most files know one or none: filters by node. No read looks for
        // a whole key.
        options.set_prefix_extractor(SliceTransform::create_fixed_prefix(NODE_PREFIX_LEN));
        options.set_memtable_prefix_bloom_ratio(0.05);
        table.set_whole_key_filtering(false);
        in_pieces(table);
        // A leaf's rows since its image, and the image, fit into one block.
        table.set_block_size(16 << 10);

        // Rows are never replaced, so that compaction only sorts. Little of it is enough, and a writer that waits
        // for it (it would hold up the index watermark) is worse than a read that looks into a few more files.
        options.set_level_zero_file_num_compaction_trigger(LEVEL_ZERO_FILES);
        in_large_levels(options);
    }
}

/// Filters, and indexes and filters of which no read needs more than a piece.
fn in_pieces(table: &mut BlockBasedOptions) {
    table.set_bloom_filter(10.0, false);
    table.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    table.set_partition_filters(true);
    table.set_pin_top_level_index_and_filter(true);
}

/// Few levels, and nobody who waits for compaction.
fn in_large_levels(options: &mut Options) {
    options.set_level_compaction_dynamic_level_bytes(true);
    options.set_level_zero_slowdown_writes_trigger(32);
    options.set_level_zero_stop_writes_trigger(64);
    // Each level costs a read one more block, whatever lies in it.
    options.set_max_bytes_for_level_base(512 * MIB as u64);
    options.set_target_file_size_base(32 * MIB as u64);
    options.set_soft_pending_compaction_bytes_limit(16 << 30);
    options.set_hard_pending_compaction_bytes_limit(64 << 30);
}
