//! Machines, as far as they get without a QEMU.

use std::fs;
use std::os::unix::fs::symlink;

use cdpd::api::{Launch, NewVm, Vm};
use cdpd::client::Client;
use hyper::Method;
use serde_json::{Value, json};

use crate::Bench;

/// What is said of QEMU's command line for a machine. Nothing is run of it but `--version`, which bash answers as QEMU does.
fn printed(bench: &Bench, options: &str, arguments: &str) -> String {
    let line = format!("vm run m --volume web1 --print {options} -- bash {arguments}");
    let output = bench.command(&line).env("LC_ALL", "C").output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_whole_command_line_is_an_answer_in_json() {
    let mut bench = Bench::new();
    bench.text("volume create web1 --size 1M");
    let words: Vec<String> = serde_json::from_str(&printed(&bench, "--json", "-m 1G -append a,b")).unwrap();
    assert_eq!(words[..5], ["bash", "-m", "1G", "-append", "a,b"]);
    assert!(words.iter().any(|word| word.starts_with("vhost-user-blk-pci,")), "{words:?}");
    assert_eq!(printed(&bench, "", "-m 1G -append a,b").trim_end(), words.join(" "));
    bench.stop();
}

#[test]
fn a_machine_of_many_processors_has_as_many_queues_as_there_are() {
    let mut bench = Bench::new();
    bench.text("volume create web1 --size 1M");
    for (processors, queues) in [(1, 1), (256, 256), (300, 256)] {
        let said = printed(&bench, "", &format!("-smp {processors}"));
        assert!(said.contains(&format!(",num-queues={queues} ")), "{said}");
    }
    bench.stop();
}

#[test]
fn a_program_is_looked_for_where_it_was_started_the_last_time() {
    let mut bench = Bench::new();
    bench.text("volume create web1 --size 1M");
    let elsewhere = bench.path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    symlink("/bin/bash", elsewhere.join("qemu")).unwrap();
    let launch = Launch {
        command: vec!["./qemu".to_owned()],
        directory: elsewhere.to_str().unwrap().to_owned(),
        disks: vec![String::new()],
        owner: None,
    };
    let volumes = vec!["web1".parse().unwrap()];
    let name = "m".parse().unwrap();
    let new = NewVm { name, volumes, qmp: "/none".to_owned(), agent: None, launch: Some(launch) };
    let client = Client::find(&bench.store()).unwrap().unwrap();
    client.send::<Vm>(Method::PUT, "/v1/vms/m", &new).unwrap();
    let output = bench.command("vm run m --print").env("LC_ALL", "C").output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && output.stdout.starts_with(b"./qemu -name m "), "{stderr}");
    bench.stop();
}

#[test]
fn a_program_that_is_not_there_changes_nothing() {
    let mut bench = Bench::new();
    bench.text("volume create web1 --size 1M");
    let complaint = bench.complaint("vm run m --volume web1 -- no-such-qemu");
    assert!(complaint.contains("cannot start no-such-qemu"), "{complaint}");
    assert!(bench.json("volume show web1")["serving"].is_null());
    bench.stop();
}

#[test]
fn a_machine_that_is_registered_again_is_changed_and_keeps_what_is_not_said() {
    let mut bench = Bench::new();
    for volume in ["web1", "data", "own"] {
        bench.text(&format!("volume create {volume} --size 1M"));
    }
    assert!(bench.text("vm register m --qmp m.qmp --volume web1").starts_with("registered m;"));
    bench.json("checkpoint schedule m --every 1h --keep 2");
    let ends = |vm: &Value, what: &str, end: &str| vm[what].as_str().is_some_and(|path| path.ends_with(end));
    let vm = bench.json("vm register m --qmp m.qmp --volume web1 --agent m.agent");
    assert!(ends(&vm, "qmp", "/m.qmp") && ends(&vm, "agent", "/m.agent"), "{vm}");
    assert!(
        bench.text("vm register m --qmp other.qmp --volume web1 --volume data").starts_with("changed m;")
    );
    let vm = bench.json("vm show m");
    assert!(ends(&vm, "qmp", "/other.qmp") && ends(&vm, "agent", "/m.agent"), "{vm}");
    assert_eq!((&vm["volumes"], &vm["schedule"]["keep"]), (&json!(["web1", "data"]), &json!(2)));

    let launch = json!({ "command": ["qemu"], "directory": "/", "disks": [""] });
    let run = json!({ "name": "r", "volumes": ["own"], "qmp": "/none", "launch": launch });
    let client = Client::find(&bench.store()).unwrap().unwrap();
    client.send::<Vm>(Method::PUT, "/v1/vms/r", &run).unwrap();
    let complaint = bench.complaint("vm register r --qmp r.qmp --volume own");
    assert!(complaint.contains("cdp-tool vm run r"), "{complaint}");
    assert_eq!(bench.json("vm show r")["launch"]["command"], json!(["qemu"]));
    bench.stop();
}

#[test]
fn a_machine_is_not_saved_for_a_copy_whose_name_is_taken() {
    let mut bench = Bench::new();
    for name in ["m", "n"] {
        bench.text(&format!("volume create {name} --size 1M"));
        bench.text(&format!("vm register {name} --qmp none.qmp --volume {name}"));
    }
    let complaint = bench.complaint("vm clone m n -- bash");
    assert!(complaint.contains("there is a machine 'n' already"), "{complaint}");
    assert!(bench.complaint("vm clone m o -- bash").contains("'m' cannot be saved as it is now"));
    bench.stop();
}
