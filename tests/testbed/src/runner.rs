// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Runs the tests of test binaries, each test in a process of its own with a time limit of its own.
//!
//! A binary follows the command line of Rust's test harness: `--list --format terse`, `--exact NAME --nocapture`,
//! `--ignored`. One convention is added: a test that cannot run here prints a line `SKIPPED: reason` and exits with
//! status [`SKIPPED`]. Results are printed as that harness prints them; the last line alone is
//! `N passed, N failed, N skipped`.

use std::fmt;
use std::io::Write;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use parking_lot::Mutex;

use crate::exec::{CommandSpec, Ending};
use crate::host::Host;

/// The exit status of a test that skipped itself.
pub const SKIPPED: i32 = 77;
/// Begins the line that says why.
pub const SKIPPED_PREFIX: &str = "SKIPPED: ";

/// For `--list`, which runs nothing.
const LIST_LIMIT: Duration = Duration::from_secs(60);
/// After this many losses of the host in a row there is no use in trying the next test.
const LOSSES: u32 = 2;
/// Output kept of one test; of more, the end, which says what failed.
const KEPT_OUTPUT: usize = 1 << 20;

/// Which tests of which binaries.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The binaries' paths on the host.
    pub binaries: Vec<String>,
    /// Tests whose name contains this; all if empty.
    pub filter: String,
    /// Run the ignored tests, and no others.
    pub ignored: bool,
    /// For each test.
    pub time_limit: Duration,
    /// Print output as it comes, not only that of failed tests.
    pub show_output: bool,
}

/// How many tests ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Ended with status 0.
    pub passed: u32,
    /// Ended otherwise, or not in time.
    pub failed: u32,
    /// Said that they cannot run, or are marked as ignored.
    pub skipped: u32,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Runs the plan's tests on `hosts`, each of which takes the next test when it has finished one, and reports to `report`.
///
/// # Errors
/// The tests cannot be listed, none matches, or a host was lost again and again. Failed tests are no error.
pub fn run(plan: &Plan, hosts: &mut [Box<dyn Host>], report: &mut dyn Write) -> Result<Summary> {
    let first = hosts.first_mut().context("tests need a host")?;
    let mut chosen = Vec::new();
    for binary in &plan.binaries {
        chosen.extend(list(binary, first.as_mut())?);
    }
    chosen.retain(|test| test.name.contains(&plan.filter) && (test.ignored || !plan.ignored));
    let binaries = plan.binaries.join(", ");
    ensure!(!chosen.is_empty(), "no test of {binaries} matches `{}`", plan.filter);
    writeln!(report, "\nrunning {} tests", chosen.len())?;
    let (ignored, chosen): (Vec<Test>, Vec<Test>) =
        chosen.into_iter().partition(|test| test.ignored && !plan.ignored);

    let mut summary = Summary::default();
    for Test { name, .. } in ignored {
        summary.skipped += 1;
        writeln!(report, "test {name} ... skipped (marked as ignored)")?;
    }
    let next = Mutex::new(chosen.into_iter());
    let (results, finished) = mpsc::channel();
    let lost = thread::scope(|scope| -> Result<bool> {
        let lanes: Vec<_> = hosts
            .iter_mut()
            .map(|host| {
                let (next, results) = (&next, results.clone());
                scope.spawn(move || lane(plan, host.as_mut(), next, &results))
            })
            .collect();
        drop(results);
        for result in finished {
            result.print(report)?;
            summary.count(&result.outcome);
        }
        Ok(lanes.into_iter().any(|lane| !matches!(lane.join(), Ok(Lane::Finished))))
    })?;
    writeln!(report, "\n{summary}")?;
    if lost {
        bail!("a host was lost {LOSSES} times in a row; the remaining tests were not run");
    }
    Ok(summary)
}

/// One test of a binary.
struct Test<'a> {
    binary: &'a str,
    name: String,
    ignored: bool,
}

/// How the work of one host ended.
enum Lane {
    /// There are no more tests.
    Finished,
    /// The host was lost again and again, and so no other host gets another test.
    Lost,
}

fn lane(
    plan: &Plan,
    host: &mut dyn Host,
    next: &Mutex<std::vec::IntoIter<Test<'_>>>,
    results: &mpsc::Sender<TestResult>,
) -> Lane {
    let mut losses = 0;
    loop {
        let Some(test) = next.lock().next() else { return Lane::Finished };
        let started = Instant::now();
        let outcome = run_one(plan, &test, host);
        losses = if matches!(outcome, Outcome::Lost(..)) { losses + 1 } else { 0 };
        // The receiver is gone when the report cannot be written; then nobody wants more.
        if results.send(TestResult { name: test.name, outcome, wall: started.elapsed() }).is_err() {
            return Lane::Finished;
        }
        if losses == LOSSES {
            next.lock().by_ref().for_each(drop);
            return Lane::Lost;
        }
    }
}

struct TestResult {
    name: String,
    outcome: Outcome,
    wall: Duration,
}

impl TestResult {
    fn print(&self, report: &mut dyn Write) -> Result<()> {
        let (name, seconds) = (&self.name, self.wall.as_secs_f64());
        match &self.outcome {
            Outcome::Passed => writeln!(report, "test {name} ... ok ({seconds:.1} s)")?,
            Outcome::Skipped(why) => writeln!(report, "test {name} ... skipped ({why})")?,
            Outcome::Failed(why, output) | Outcome::Lost(why, output) => {
                writeln!(report, "test {name} ... FAILED ({seconds:.1} s): {why}")?;
                print_output(name, output, report)?;
            }
        }
        Ok(report.flush()?)
    }
}

impl Summary {
    fn count(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Passed => self.passed += 1,
            Outcome::Skipped(_) => self.skipped += 1,
            Outcome::Failed(..) | Outcome::Lost(..) => self.failed += 1,
        }
    }
}

enum Outcome {
    Passed,
    Skipped(String),
    Failed(String, Vec<u8>),
    /// The host did not survive the test.
    Lost(String, Vec<u8>),
}

fn run_one(plan: &Plan, test: &Test<'_>, host: &mut dyn Host) -> Outcome {
    let mut arguments = vec!["--exact", &test.name, "--nocapture"];
    if plan.ignored {
        arguments.push("--ignored");
    }
    let spec = command(test.binary, &arguments, plan.time_limit);
    let mut kept = Vec::new();
    let result = host.run(&spec, &mut |_, bytes| {
        if plan.show_output {
            // To our standard error: a broken pipe there is nobody's failure.
            let _ = std::io::stderr().write_all(bytes);
        }
        kept.extend_from_slice(bytes);
        let excess = kept.len().saturating_sub(KEPT_OUTPUT);
        kept.drain(..excess);
    });
    match result {
        Ok(Ending::Exited(0)) => Outcome::Passed,
        Ok(Ending::Exited(SKIPPED)) => match reason_of_skip(&kept) {
            Some(reason) => Outcome::Skipped(reason),
            None => Outcome::Failed("skipped without saying why".into(), kept),
        },
        Ok(ending) => Outcome::Failed(ending.to_string(), kept),
        Err(error) => Outcome::Lost(format!("{error:#}"), kept),
    }
}

fn reason_of_skip(output: &[u8]) -> Option<String> {
    let output = String::from_utf8_lossy(output);
    let reason = output.lines().find_map(|line| line.trim().strip_prefix(SKIPPED_PREFIX))?.trim();
    (!reason.is_empty()).then(|| reason.to_owned())
}

fn print_output(name: &str, output: &[u8], report: &mut dyn Write) -> Result<()> {
    writeln!(report, "---- {name} output ----")?;
    report.write_all(output)?;
    if !output.ends_with(b"\n") {
        writeln!(report)?;
    }
    writeln!(report, "---- end of {name} ----")?;
    Ok(())
}

fn list<'a>(binary: &'a str, host: &mut dyn Host) -> Result<Vec<Test<'a>>> {
    let all = names(binary, host, &["--list", "--format", "terse"])?;
    let ignored = names(binary, host, &["--list", "--format", "terse", "--ignored"])?;
    let test = |name| Test { binary, ignored: ignored.contains(&name), name };
    Ok(all.into_iter().map(test).collect())
}

fn names(binary: &str, host: &mut dyn Host, arguments: &[&str]) -> Result<Vec<String>> {
    let mut output = Vec::new();
    let ending = host
        .run(&command(binary, arguments, LIST_LIMIT), &mut |_, bytes| {
            output.extend_from_slice(bytes);
        })
        .context("listing the tests")?;
    let output = String::from_utf8_lossy(&output);
    ensure!(ending == Ending::Exited(0), "listing the tests of {binary}: {ending}\n{output}");
    Ok(output.lines().filter_map(|l| l.strip_suffix(": test")).map(str::to_owned).collect())
}

fn command(binary: &str, arguments: &[&str], time_limit: Duration) -> CommandSpec {
    let arguments = arguments.iter().map(|a| (*a).to_owned());
    CommandSpec {
        argv: std::iter::once(binary.to_owned()).chain(arguments).collect(),
        time_limit: Some(time_limit),
        ..CommandSpec::default()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::native::Native;

    /// A test binary in shell, run on this machine.
    fn run_script(
        tests: &str,
        hosts: usize,
        plan: impl FnOnce(&mut Plan),
    ) -> (Result<Summary>, String) {
        let work = tempfile::tempdir().unwrap();
        let path = work.path().join("tests.sh");
        let script = format!("#!/bin/sh\ncase \"$*\" in\n{tests}\nesac\n");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let mut the_plan = Plan {
            binaries: vec![path.display().to_string()],
            filter: String::new(),
            ignored: false,
            time_limit: Duration::from_secs(1),
            show_output: false,
        };
        plan(&mut the_plan);
        let mut hosts: Vec<Box<dyn Host>> =
            (0..hosts).map(|_| Box::new(Native::new(&[], &[]).unwrap()) as Box<dyn Host>).collect();
        let mut report = Vec::new();
        let summary = run(&the_plan, &mut hosts, &mut report);
        (summary, String::from_utf8(report).unwrap())
    }

    const TESTS: &str = r#"
        "--list --format terse") printf 'good: test\nbad: test\nstuck: test\nlame: test\nmute: test\nold: test\nb: bench\n';;
        *--ignored) echo "old: test";;
        *good*) echo fine;;
        *bad*) echo the reason is this; exit 101;;
        *stuck*) sleep 1000;;
        *lame*) echo SKIPPED: no such hardware; exit 77;;
        *mute*) exit 77;;
    "#;

    #[test]
    fn results_are_counted_and_explained() {
        let (summary, report) = run_script(TESTS, 1, |_| ());
        assert_eq!(summary.unwrap(), Summary { passed: 1, failed: 3, skipped: 2 });
        assert!(report.contains("test good ... ok ("), "{report}");
        assert!(!report.contains("fine"), "{report}");
        assert!(
            report.contains("): exit status 101\n---- bad output ----\nthe reason is this\n"),
            "{report}"
        );
        assert!(report.contains("still running after 1 s, killed"), "{report}");
        assert!(report.contains("test lame ... skipped (no such hardware)\n"), "{report}");
        assert!(report.contains("test old ... skipped (marked as ignored)\n"), "{report}");
        assert!(report.ends_with("\n1 passed, 3 failed, 2 skipped\n"), "{report}");
    }

    #[test]
    fn two_hosts_share_the_tests() {
        // Each waits for the other to have begun.
        let tests = r#"
            "--list --format terse") printf 'one: test\ntwo: test\n';;
            *one*) touch "$0.one"; until [ -e "$0.two" ]; do sleep 0.01; done;;
            *two*) touch "$0.two"; until [ -e "$0.one" ]; do sleep 0.01; done;;
        "#;
        let (summary, report) =
            run_script(tests, 2, |plan| plan.time_limit = Duration::from_secs(60));
        assert_eq!(summary.unwrap(), Summary { passed: 2, ..Summary::default() }, "{report}");
    }

    #[test]
    fn a_filter_chooses_and_must_choose_something() {
        let (summary, _) = run_script(TESTS, 1, |plan| plan.filter = "goo".into());
        assert_eq!(summary.unwrap(), Summary { passed: 1, ..Summary::default() });
        let (summary, _) = run_script(TESTS, 1, |plan| plan.filter = "nothing".into());
        assert!(summary.unwrap_err().to_string().contains("`nothing`"));
    }

    #[test]
    fn the_tests_of_several_binaries_are_one_list() {
        let (summary, report) =
            run_script(TESTS, 1, |plan| plan.binaries.extend(plan.binaries.clone()));
        assert_eq!(summary.unwrap(), Summary { passed: 2, failed: 6, skipped: 4 }, "{report}");
    }

    /// Lists three tests and dies of those whose names say so.
    struct Mortal {
        runs: Arc<AtomicU32>,
    }

    impl Host for Mortal {
        fn run(&mut self, spec: &CommandSpec, output: crate::host::Output<'_>) -> Result<Ending> {
            let arguments = spec.argv.join(" ");
            if arguments.ends_with("terse") {
                output(
                    crate::exec::Stream::Stdout,
                    b"deadly1: test\nfine: test\ndeadly2: test\ndeadly3: test\nlast: test\n",
                );
            } else if !arguments.ends_with("--ignored") {
                self.runs.fetch_add(1, Ordering::Relaxed);
            }
            ensure!(!arguments.contains("deadly"), "the host died of it");
            Ok(Ending::Exited(0))
        }

        fn run_on_terminal(&mut self, _: &CommandSpec) -> Result<Ending> {
            bail!("no terminal")
        }

        fn path_of(&self, file: &crate::files::GivenFile) -> String {
            file.name.clone()
        }

        fn collect(&mut self, _: &std::path::Path) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_next_test_runs_after_a_lost_host_but_not_for_ever() {
        let plan = Plan {
            binaries: vec!["tests".into()],
            filter: String::new(),
            ignored: false,
            time_limit: Duration::from_secs(1),
            show_output: false,
        };
        let runs = Arc::new(AtomicU32::new(0));
        let mut hosts: [Box<dyn Host>; 1] = [Box::new(Mortal { runs: Arc::clone(&runs) })];
        let mut report = Vec::new();
        let error = run(&plan, &mut hosts, &mut report).unwrap_err();
        let report = String::from_utf8(report).unwrap();
        assert!(error.to_string().contains("2 times in a row"), "{error}");
        assert!(
            report.contains("test deadly1 ... FAILED") && report.contains("the host died of it"),
            "{report}"
        );
        assert!(report.ends_with("\n1 passed, 3 failed, 0 skipped\n"), "{report}");
        assert_eq!(runs.load(Ordering::Relaxed), 4, "{report}");
    }

    #[test]
    fn a_binary_that_cannot_list_is_an_error() {
        let (summary, _) = run_script("*) echo broken; exit 3;;", 1, |_| ());
        assert!(summary.unwrap_err().to_string().contains("broken"));
    }
}
