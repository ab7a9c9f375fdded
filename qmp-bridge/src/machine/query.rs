//! Asking QEMU what a machine is made of.

use qapi_spec::Command;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::devices::{devices, networks};
use super::{Accelerator, Chardev, Disk, Machine, MemoryBackend};
use crate::client::{Client, read_as};
use crate::control;
use crate::error::{ErrorKind, Result};
use crate::migration;

/// What QEMU says for a machine that was given no UUID.
const NO_UUID: &str = "00000000-0000-0000-0000-000000000000";

/// Asks for all of it. It takes a dozen commands, one after the other: what is plugged meanwhile may be seen in part.
///
/// # Errors
/// As [`Client::execute_raw`], and `Unexpected`.
pub async fn describe(client: &Client) -> Result<Machine> {
    let memory = client.execute(qapi_qmp::query_memory_size_summary {}).await?;
    let cpus: Vec<Value> = query::<_, qapi_qmp::query_cpus_fast>(client).await?;
    let uuid = client.execute(qapi_qmp::query_uuid {}).await?.UUID;
    Ok(Machine {
        version: client.version().clone(),
        run_state: control::run_state(client).await?.status,
        name: client.execute(qapi_qmp::query_name {}).await?.name,
        uuid: (uuid != NO_UUID).then_some(uuid),
        machine_type: machine_type(client).await?,
        accelerator: accelerator(client).await?,
        cpus: cpus.len() as u32,
        memory_bytes: memory.base_memory,
        plugged_memory_bytes: memory.plugged_memory.unwrap_or(0),
        memory: query::<Vec<MemoryBackend>, qapi_qmp::query_memdev>(client).await?,
        devices: devices(client).await?,
        networks: networks(client).await?,
        chardevs: chardevs(client).await?,
        disks: disks(client).await?,
        blockers: migration::progress(client).await?.blockers,
    })
}

/// A query whose reply has fields that differ between versions: only those that are needed here are read.
async fn query<T: DeserializeOwned, C: Command>(client: &Client) -> Result<T> {
    read_as(C::NAME, client.execute_raw(C::NAME, Value::Null).await?)
}

async fn machine_type(client: &Client) -> Result<String> {
    let command = qapi_qmp::qom_get { path: "/machine".to_owned(), property: "type".to_owned() };
    let class: String = read_as(qapi_qmp::qom_get::NAME, client.execute(command).await?)?;
    // The class of `-machine X` is `X-machine`.
    Ok(class.strip_suffix("-machine").unwrap_or(&class).to_owned())
}

/// No version up to 10.0 says it outright: KVM is asked for, and TCG betrays itself by having translated code.
async fn accelerator(client: &Client) -> Result<Accelerator> {
    if client.execute(qapi_qmp::query_kvm {}).await?.enabled {
        return Ok(Accelerator::Kvm);
    }
    match client.execute(qapi_qmp::x_query_jit {}).await {
        Ok(_) => Ok(Accelerator::Tcg),
        Err(error) if matches!(error.kind(), ErrorKind::Refused | ErrorKind::UnknownCommand) => {
            Ok(Accelerator::Other)
        }
        Err(error) => Err(error),
    }
}

/// All character devices, with the paths of those that are Unix sockets.
async fn chardevs(client: &Client) -> Result<Vec<Chardev>> {
    let mut chardevs: Vec<Chardev> = query::<_, qapi_qmp::query_chardev>(client).await?;
    for chardev in chardevs.iter_mut().filter(|chardev| chardev.filename.contains("unix:")) {
        let path = format!("/chardevs/{}", chardev.label);
        let addr = client.execute(qapi_qmp::qom_get { path, property: "addr".to_owned() }).await;
        chardev.socket = match addr {
            Ok(addr) => addr["path"].as_str().map(str::to_owned),
            // It is gone, or has no such property.
            Err(error) if error.kind() == ErrorKind::Refused => None,
            Err(error) => return Err(error),
        };
    }
    Ok(chardevs)
}

#[derive(Deserialize)]
struct Drive {
    device: String,
    qdev: Option<String>,
    inserted: Option<Inserted>,
}

#[derive(Deserialize)]
struct Inserted {
    ro: bool,
    drv: String,
    file: String,
}

/// Disks that have something in them. Nodes of the block graph that no device uses are left out: the guest cannot
/// reach them.
async fn disks(client: &Client) -> Result<Vec<Disk>> {
    let drives: Vec<Drive> = query::<_, qapi_qmp::query_block>(client).await?;
    Ok(drives
        .into_iter()
        .filter_map(|drive| {
            let Inserted { ro, drv, file } = drive.inserted?;
            let name = Some(drive.device).filter(|name| !name.is_empty()).or(drive.qdev)?;
            Some(Disk { name, driver: drv, file, writable: !ro })
        })
        .collect())
}
