//! A database at work goes back with its machine: it answers at once, has nothing to recover, and holds what it held.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::debian::{HOST_NAME, postgresql_image};
use e2e::process::wait_for;
use e2e::{Boot, Cdpd, Guest, Scene, Tool, run_scene};

/// systemd and a database under an emulator on a busy machine.
const BOOT: Duration = Duration::from_secs(420);
const ANSWER: Duration = Duration::from_secs(120);
const BETWEEN: Duration = Duration::from_secs(10);
const CHECKPOINTS: usize = 6;
const LOG: &str = "/var/log/postgresql/postgresql-15-main.log";

/// One statement, so one moment of the database. Here as in all that is typed, a word that is waited for is in two pieces:
/// its echo must not be taken for it.
const QUESTION: &str = "select 'ans' || 'wer ' || concat_ws(' ', \
    (select count(*) from ledger), (select max(n) from ledger), (select count(*) from pgbench_history), \
    (select sum(delta) from pgbench_history), (select sum(abalance) from pgbench_accounts), \
    (select sum(bbalance) from pgbench_branches), (select sum(tbalance) from pgbench_tellers))";

/// What the database says of itself.
#[derive(Clone, Copy, Debug)]
struct Answer {
    /// The newest number in the ledger.
    newest: i64,
    /// Transactions of `pgbench`.
    transactions: i64,
}

/// A guest with a database, steered by what is typed on its console.
struct Database {
    guest: Guest,
}

impl Database {
    /// Types a command that prints a line with `word` and numbers at its end, and returns these.
    fn ask(&mut self, command: &str, word: &str) -> Result<Vec<i64>> {
        let before = self.said(word)?.len();
        self.guest.type_console(&format!("{command}\n"))?;
        wait_for(&format!("'{word}' after {command}"), ANSWER, || Ok(self.said(word)?.get(before).cloned()))
    }

    /// The numbers of all lines that end with a word and numbers. A prompt may be before them, or what is being typed.
    fn said(&self, word: &str) -> Result<Vec<Vec<i64>>> {
        let numbers = |line: &str| {
            let (_, numbers) = line.rsplit_once(&format!("{word} "))?;
            numbers.split_whitespace().map(|number| number.parse().ok()).collect::<Option<Vec<i64>>>()
        };
        Ok(self.guest.said()?.lines().filter_map(numbers).collect())
    }

    /// The newest number that the ledger's client has printed.
    fn printed(&self) -> Result<Option<i64>> {
        Ok(self.said("ledger")?.last().and_then(|line| line.first().copied()))
    }

    fn log_in(&mut self) -> Result<()> {
        self.guest.wait_console(&format!("{HOST_NAME} login: "), BOOT)?;
        self.guest.type_console("root\n")?;
        self.guest.wait_console(&format!("root@{HOST_NAME}"), ANSWER)
    }

    fn wait_until_up(&mut self) -> Result<()> {
        let up =
            "until su postgres -c 'psql -qc \"select 1\"' >/dev/null 2>&1; do sleep 1; done; echo u''p 1";
        self.ask(up, "up").map(drop)
    }

    /// Starts `pgbench`, and a client that writes numbers into a ledger and prints each when it is committed.
    fn set_to_work(&mut self) -> Result<()> {
        self.wait_until_up()?;
        self.ask(
            "su postgres -c 'createdb bench; pgbench -i -q -s 2 bench' >/tmp/init 2>&1; echo ma''de $?",
            "made",
        )?;
        let table = "create table ledger (n bigint primary key)";
        self.ask(&format!("su postgres -c \"psql -qc '{table}' bench\"; echo ta''ble $?"), "table")?;
        self.guest.type_console("su postgres -c 'pgbench -n -c 2 -T 36000 bench' >/tmp/pgbench 2>&1 &\n")?;
        self.guest.type_console(
            "(n=0; while :; do n=$((n+1)); \
             echo \"insert into ledger values ($n) returning 'led' || 'ger ' || n;\"; sleep 0.1; done | \
             su postgres -c 'psql -qAt bench') &\n",
        )?;
        wait_for("the ledger", ANSWER, || Ok(self.printed()?.filter(|&number| number > 20)))?;
        Ok(())
    }

    /// Asks the database for everything; what `pgbench` keeps equal must be, and no number of the ledger may be missing.
    fn answer(&mut self) -> Result<Answer> {
        let numbers =
            self.ask(&format!("su postgres -c \"psql -qAtc \\\"{QUESTION}\\\" bench\""), "answer")?;
        let &[rows, newest, transactions, delta, accounts, branches, tellers] = numbers.as_slice() else {
            anyhow::bail!("the database said {numbers:?}");
        };
        ensure!(rows == newest, "{rows} rows up to number {newest}");
        ensure!(
            [accounts, branches, tellers] == [delta; 3],
            "the balances differ: {delta} {accounts} {branches} {tellers}"
        );
        Ok(Answer { newest, transactions })
    }

    /// How often the database has started, and how often after a crash.
    fn starts(&mut self) -> Result<(i64, i64)> {
        let command = format!(
            "echo sta''rts $(grep -c 'ready to accept connections' {LOG}) $(grep -c 'was interrupted\\|not properly shut down' {LOG})"
        );
        match self.ask(&command, "starts")?.as_slice() {
            &[starts, crashes] => Ok((starts, crashes)),
            other => anyhow::bail!("the log said {other:?}"),
        }
    }
}

/// A checkpoint, and the newest numbers that had been printed before it was asked for and after it was complete.
struct Taken {
    id: String,
    before: i64,
    after: i64,
}

fn take(tool: &Tool, database: &Database) -> Result<Taken> {
    let printed = || database.printed()?.context("the ledger's client says nothing");
    let before = printed()?;
    let taken = tool.json(&["checkpoint", "take", "db", "--mode", "hot"])?;
    let after = printed()?;
    let id = taken["id"].as_u64().context("a checkpoint without a number")?.to_string();
    println!("checkpoint {id}, between {before} and {after}: {}", taken["figures"]);
    Ok(Taken { id, before, after })
}

fn go_back(scene: &Scene, tool: &Tool) -> Result<()> {
    tool.run(&["volume", "create", "db", "--from", &postgresql_image()?.to_string_lossy()])?;
    let (socket, qmp) = (tool.serve(scene, "db", 2)?, scene.path("db.qmp"));
    tool.run(&["vm", "register", "db", "--qmp", &qmp.to_string_lossy(), "--volume", "db"])?;
    let builder = Guest::builder().disk(&socket).queues(2).smp(2).memory_mb(768).into(Boot::Disk).qmp(&qmp);
    let mut database = Database { guest: builder.clone().boot(scene)? };
    database.log_in()?;
    database.set_to_work()?;
    let mut taken = Vec::new();
    for _ in 0..CHECKPOINTS {
        std::thread::sleep(BETWEEN);
        taken.push(take(tool, &database)?);
    }
    println!("in the end: {:?}", database.answer()?);
    ensure!(database.starts()? == (1, 0), "the database was started more than once");
    database.guest.kill()?;

    let Taken { id, before, after } = &taken[CHECKPOINTS / 2];
    let mut database = Database { guest: builder.clone().waiting().boot(scene)? };
    tool.run(&["vm", "revert", "db", "--to", id])?;
    let first = wait_for("the ledger", ANSWER, || Ok(database.said("ledger")?.first().cloned()))?;
    let first = *first.first().context("the ledger's client has printed nothing")?;
    // What was being committed or printed at that moment comes out after it.
    ensure!((*before..=after + 2).contains(&first), "goes on at {first}, not between {before} and {after}");
    ensure!(database.starts()? == (1, 0), "the database has been started, and has recovered");
    let (then, later) = (database.answer()?, database.answer()?);
    println!("back at checkpoint {id}, at {first}: {then:?}, {later:?}");
    ensure!(then.newest >= first && later.newest > then.newest, "the ledger does not go on");
    ensure!(later.transactions > then.transactions, "pgbench does not go on");
    database.guest.kill()?;

    // The disk alone, of the same instant, is one after a power cut: this test would notice.
    tool.run(&["vm", "revert", "db", "--to", id, "--disks-only"])?;
    let mut database = Database { guest: builder.boot(scene)? };
    database.log_in()?;
    database.wait_until_up()?;
    let (starts, crashes) = database.starts()?;
    ensure!(starts > 1 && crashes > 0, "a disk without its memory was not recovered: {starts} {crashes}");
    database.guest.kill()
}

#[test]
#[ignore = "installs PostgreSQL once, and boots Debian twice under an emulator"]
fn a_database_goes_back_with_its_machine_and_has_nothing_to_recover() {
    run_scene(|scene| {
        let mut cdpd = Cdpd::start(scene)?;
        go_back(scene, &cdpd.tool())?;
        cdpd.tool().run(&["verify"])?;
        cdpd.stop()
    });
}
