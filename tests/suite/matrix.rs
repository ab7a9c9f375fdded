//! Checkpoints in a row of machines of every shape, each of them gone back to: memory and disks agree, always.

use anyhow::{Result, ensure};
use e2e::{Cdpd, Scene, Tool, run_scene};

use crate::load::Load;
use crate::machine::{Machine, Shape, id_of};

/// Takes checkpoints of a working machine one after the other, then goes back to each of them. All must be complete, and
/// in all of them memory and disks must be of one instant.
fn save_all_and_go_back_to_each(scene: &Scene, tool: &Tool, shape: Shape, modes: &[&str]) -> Result<()> {
    let machine = Machine::new(scene, tool, shape, None)?;
    let guest = machine.boot()?;
    let mut taken = Vec::new();
    for mode in modes {
        taken.push(id_of(&machine.take(mode)?)?);
        Load::wait_for_progress(&guest, 1)?;
    }
    Load::must_match(&guest)?;
    guest.kill()?;
    let listed = machine.checkpoints()?;
    ensure!(listed.len() == modes.len(), "{listed:?}");
    ensure!(listed.iter().all(|one| one["state"] == "committed"), "one was discarded: {listed:?}");
    for id in &taken {
        machine.bring_back(id)?.kill()?;
        println!("{shape:?}: checkpoint {id} is of one instant");
    }
    Ok(())
}

#[test]
fn a_machine_with_many_processors_queues_and_disks_is_of_one_instant() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        let shape = Shape { cpus: 4, queues: 4, disks: 3 };
        save_all_and_go_back_to_each(scene, &cdpd.tool(), shape, &["hot", "live", "hot"])?;
        cdpd.stop()
    });
}

#[test]
#[ignore = "takes ten minutes"]
fn fifty_checkpoints_in_a_row_of_every_shape_and_mode_are_of_one_instant() {
    for (cpus, queues) in [(1, 1), (1, 4), (4, 1), (4, 4)] {
        for disks in [1, 3] {
            run_scene(|scene| {
                let mut cdpd = Cdpd::start(scene)?;
                let shape = Shape { cpus, queues, disks };
                let modes = ["hot", "live", "pause", "hot", "hot", "live", "hot"];
                save_all_and_go_back_to_each(scene, &cdpd.tool(), shape, &modes)?;
                cdpd.tool().run(&["verify"])?;
                cdpd.stop()
            });
        }
    }
}
