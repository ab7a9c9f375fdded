//! QEMU's migration settings: all of them, and those that are to be put back.

use std::collections::BTreeMap;

use qapi_spec::Command;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::client::{Client, read_as};
use crate::error::Result;
use crate::message::Version;

/// All capabilities and parameters that a QEMU has, as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// By name. Which there are depends on the version.
    pub capabilities: BTreeMap<String, bool>,
    /// By name, with the values as QEMU gives and takes them.
    pub parameters: Map<String, Value>,
}

/// What settings were before a [`Plan`](super::Plan) changed them, to be put back by whoever comes to it: this process,
/// or after its death another that finds this written down. Settings that the plan left alone are not in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The version of the QEMU that these are of.
    pub version: Version,
    /// Whether the machine ran, so that it is to run again.
    pub running: bool,
    /// Capabilities that the plan changes, as they were.
    pub capabilities: BTreeMap<String, bool>,
    /// Parameters that the plan changes, as they were.
    pub parameters: Map<String, Value>,
}

#[derive(Deserialize)]
struct Capability {
    capability: String,
    state: bool,
}

impl Settings {
    /// Reads them.
    ///
    /// # Errors
    /// As [`Client::execute_raw`], and `Unexpected`.
    pub async fn read(client: &Client) -> Result<Self> {
        // Not with the schema's types: each version has capabilities and parameters that others lack.
        let query = qapi_qmp::query_migrate_capabilities::NAME;
        let listed: Vec<Capability> = read_as(query, client.execute_raw(query, Value::Null).await?)?;
        let query = qapi_qmp::query_migrate_parameters::NAME;
        let parameters = read_as(query, client.execute_raw(query, Value::Null).await?)?;
        let capabilities = listed.into_iter().map(|listed| (listed.capability, listed.state)).collect();
        Ok(Self { capabilities, parameters })
    }

    /// Makes QEMU's settings, which are `self`, those of `wanted`, where they differ. What QEMU does not have is left
    /// out.
    ///
    /// # Errors
    /// As [`Client::execute_raw`]; QEMU refuses while a migration runs.
    pub(crate) async fn change(
        &self,
        client: &Client,
        capabilities: &BTreeMap<String, bool>,
        parameters: &Map<String, Value>,
    ) -> Result<()> {
        let differ = |(name, wanted): &(&String, &bool)| {
            self.capabilities.get(*name).is_some_and(|current| current != *wanted)
        };
        let capabilities: Vec<Value> = capabilities
            .iter()
            .filter(differ)
            .map(|(name, state)| json!({ "capability": name, "state": state }))
            .collect();
        if !capabilities.is_empty() {
            // In one command: QEMU checks the set as a whole.
            let arguments = json!({ "capabilities": capabilities });
            client.execute_raw(qapi_qmp::migrate_set_capabilities::NAME, arguments).await?;
        }
        let parameters: Map<String, Value> = parameters
            .iter()
            .filter(|(name, wanted)| self.parameters.get(*name).is_some_and(|current| current != *wanted))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        if !parameters.is_empty() {
            client.execute_raw(qapi_qmp::migrate_set_parameters::NAME, Value::Object(parameters)).await?;
        }
        Ok(())
    }
}

impl Saved {
    /// Whether all is as it was, so that the plan is not in effect. A plan that changes nothing always is.
    ///
    /// # Errors
    /// As [`Settings::read`].
    pub(crate) async fn is_back(&self, client: &Client) -> Result<bool> {
        if self.capabilities.is_empty() && self.parameters.is_empty() {
            return Ok(false);
        }
        let now = Settings::read(client).await?;
        let capabilities =
            self.capabilities.iter().all(|(name, was)| now.capabilities.get(name) == Some(was));
        let parameters = self.parameters.iter().all(|(name, was)| now.parameters.get(name) == Some(was));
        Ok(capabilities && parameters)
    }

    /// Puts the settings back. Doing it again changes nothing.
    ///
    /// # Errors
    /// As [`Client::execute_raw`]; QEMU refuses while a migration runs: see [`wind_down`](super::wind_down).
    pub async fn restore(&self, client: &Client) -> Result<()> {
        Settings::read(client).await?.change(client, &self.capabilities, &self.parameters).await
    }
}
