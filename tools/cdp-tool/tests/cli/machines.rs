//! Machines, as far as they get without a QEMU.

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
