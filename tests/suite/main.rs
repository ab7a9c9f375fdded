//! The whole system, end to end; each module's first lines say what it shows.

#![allow(clippy::unwrap_used)]

mod checkpoints;
mod debian;
mod disaster;
mod discard;
mod disks;
mod doctor;
mod every_state;
mod hot_memory;
mod images;
mod interrupted;
mod killed_daemon;
mod lifecycle;
mod load;
mod machine;
mod matrix;
mod nbd;
mod nbd_guests;
mod no_room;
mod past;
mod postgres;
mod power_cord;
mod quiesced;
mod rebuild;
mod refusals;
mod tap;
mod testbed;
mod vm_run;
mod write_cache;
mod writers;
