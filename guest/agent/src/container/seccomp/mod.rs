// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Seccomp profiles of the OCI runtime specification (config-linux.md, "Seccomp") as classic BPF, and their loading
//! (seccomp(2)). No C library is asked.
//!
//! Rules are tried in the order of the profile and the first one that matches decides; conditions on the same argument
//! are alternatives, on different arguments all must hold, as libseccomp's users expect. Names that this kernel does
//! not have are passed over, since profiles are written for many kernels. A program of an instruction set that the
//! profile does not list is killed at its first call. Left out: `SCMP_ACT_NOTIFY`, which needs a listener on the host.

mod table;

use anyhow::{Context, Result, bail};
use ecr_agent_protocol::oci::{LinuxSeccomp, LinuxSeccompArg, LinuxSyscall};
use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W,
    sock_filter,
};
use nix::errno::Errno;

/// Offsets in `struct seccomp_data` (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
/// The kernel's limit on one filter.
const MAX_INSTRUCTIONS: usize = 4096;
/// `seccomp(2)` knows six arguments of a call.
const MAX_ARGUMENTS: u64 = 6;

/// The programs of one instruction set and calling convention.
struct Abi {
    /// What profiles call it.
    name: &'static str,
    /// How the kernel says it, `AUDIT_ARCH_*`.
    audit: u32,
    tables: &'static [&'static [(&'static str, u32)]],
}

impl Abi {
    fn number(&self, name: &str) -> Option<u32> {
        let mut known = self.tables.iter().flat_map(|table| table.iter());
        known.find(|(known, _)| *known == name).map(|&(_, number)| number)
    }
}

/// A profile ready to be loaded.
#[derive(Debug)]
pub struct Filter {
    program: Vec<sock_filter>,
    flags: libc::c_ulong,
}

impl Filter {
    /// Translate a profile.
    pub fn compile(profile: &LinuxSeccomp) -> Result<Self> {
        let default = action(&profile.default_action, None)?;
        let mut flags = 0;
        for flag in &profile.flags {
            flags |= match flag.as_str() {
                // There is one thread, and it waits for nobody.
                "SECCOMP_FILTER_FLAG_TSYNC" | "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV" => 0,
                "SECCOMP_FILTER_FLAG_LOG" => libc::SECCOMP_FILTER_FLAG_LOG,
                "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                other => bail!("seccomp flag {other:?} is not known"),
            };
        }
        let mut program = Vec::new();
        for (index, abi) in table::ABIS.iter().enumerate() {
            // The native one is meant by a profile that names none.
            if index == 0 || profile.architectures.iter().any(|name| name == abi.name) {
                section(&mut program, abi, profile, default)?;
            }
        }
        program.push(ret(libc::SECCOMP_RET_KILL_PROCESS));
        if program.len() > MAX_INSTRUCTIONS {
            bail!(
                "the seccomp profile needs {} BPF instructions; the kernel takes {MAX_INSTRUCTIONS}",
                program.len()
            );
        }
        Ok(Filter { program, flags })
    }

    /// Put this thread under the filter for ever. Needs CAP_SYS_ADMIN or "no new privileges".
    pub fn load(&self) -> Result<()> {
        let program = libc::sock_fprog {
            // Compilation has checked the length.
            len: self.program.len() as u16,
            filter: self.program.as_ptr().cast_mut(),
        };
        // SAFETY: the program lives until the call returns, and the kernel only reads it.
        let outcome = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, self.flags, &program)
        };
        Errno::result(outcome).context("load the seccomp filter")?;
        Ok(())
    }
}

/// What happens to the programs of one instruction set; others fall through to the end.
fn section(
    program: &mut Vec<sock_filter>,
    abi: &Abi,
    profile: &LinuxSeccomp,
    default: u32,
) -> Result<()> {
    let mut body = vec![load(NUMBER)];
    let mut newest = 0;
    for rule in &profile.syscalls {
        let action = action(&rule.action, errno(rule))?;
        let matches = conditions(&rule.args)?;
        for number in rule.names.iter().filter_map(|name| abi.number(name)) {
            newest = newest.max(number);
            call(&mut body, number, &matches, action)?;
        }
    }
    // Programs try new calls and fall back when there are none: a profile older than the call must not say EPERM.
    if default & libc::SECCOMP_RET_ACTION_FULL == libc::SECCOMP_RET_ERRNO {
        let enosys = ret(libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32);
        body.extend([jump(BPF_JGT, newest, 0, 1), enosys]);
    }
    body.push(ret(default));
    // A conditional jump reaches 255 instructions; the unconditional one reaches all.
    let over = u32::try_from(body.len()).context("the seccomp profile is too long")?;
    program.push(load(ARCHITECTURE));
    program.push(jump(BPF_JEQ, abi.audit, 1, 0));
    program.push(statement(BPF_JMP | libc::BPF_JA, over));
    program.append(&mut body);
    Ok(())
}

/// `if number == this && arguments match { return action }`. The accumulator holds the number before and after.
fn call(
    body: &mut Vec<sock_filter>,
    number: u32,
    conditions: &[sock_filter],
    action: u32,
) -> Result<()> {
    if conditions.is_empty() {
        body.extend([jump(BPF_JEQ, number, 0, 1), ret(action)]);
        return Ok(());
    }
    // The conditions end here if they do not hold: over the return, to the reload.
    let skip =
        u8::try_from(conditions.len() + 2).context("a seccomp rule has too many arguments")?;
    body.push(jump(BPF_JEQ, number, 0, skip));
    body.extend_from_slice(conditions);
    body.extend([ret(action), load(NUMBER)]);
    Ok(())
}

/// Code that goes on after its end if all arguments match, and one instruction further if not.
fn conditions(arguments: &[LinuxSeccompArg]) -> Result<Vec<sock_filter>> {
    let mut groups: Vec<Vec<&LinuxSeccompArg>> = Vec::new();
    for argument in arguments {
        match groups.iter_mut().find(|group| group.iter().any(|one| one.index == argument.index)) {
            Some(group) => group.push(argument),
            None => groups.push(vec![argument]),
        }
    }
    // From the last to the first: each jumps over those behind it, whose length is known by then.
    let mut code = Vec::new();
    for group in groups.iter().rev() {
        let fail = code.len() + 1;
        let mut alternatives = Vec::new();
        for (index, argument) in group.iter().enumerate().rev() {
            // A failed alternative tries the next one.
            let last = index + 1 == group.len();
            let no = if last { alternatives.len() + fail } else { 0 };
            let mut one = compare(argument, alternatives.len(), no)?;
            one.append(&mut alternatives);
            alternatives = one;
        }
        alternatives.append(&mut code);
        code = alternatives;
    }
    Ok(code)
}

/// Compare one argument, 64 bits in two halves. `yes` and `no` count instructions behind the comparison.
fn compare(argument: &LinuxSeccompArg, yes: usize, no: usize) -> Result<Vec<sock_filter>> {
    if argument.index >= MAX_ARGUMENTS {
        bail!("seccomp argument {}: a call has arguments 0 to 5", argument.index);
    }
    let low = ARGUMENTS + 8 * argument.index as u32;
    let high = low + 4;
    let split = |value: u64| ((value >> 32) as u32, value as u32);
    let (value_high, value_low) = split(argument.value);
    let far = || u8::try_from(yes.max(no) + 3).context("a seccomp rule has too many arguments");
    far()?;
    let (yes, no) = (yes as u8, no as u8);
    let code = match argument.op.as_str() {
        "SCMP_CMP_EQ" => vec![
            load(high),
            jump(BPF_JEQ, value_high, 0, no + 2),
            load(low),
            jump(BPF_JEQ, value_low, yes, no),
        ],
        "SCMP_CMP_NE" => vec![
            load(high),
            jump(BPF_JEQ, value_high, 0, yes + 2),
            load(low),
            jump(BPF_JEQ, value_low, no, yes),
        ],
        "SCMP_CMP_MASKED_EQ" => {
            let (wanted_high, wanted_low) = split(argument.value_two);
            vec![
                load(high),
                statement(BPF_ALU | BPF_AND | BPF_K, value_high),
                jump(BPF_JEQ, wanted_high, 0, no + 3),
                load(low),
                statement(BPF_ALU | BPF_AND | BPF_K, value_low),
                jump(BPF_JEQ, wanted_low, yes, no),
            ]
        }
        "SCMP_CMP_GT" => ordered(high, low, argument.value, BPF_JGT, (yes, no), (yes, no)),
        "SCMP_CMP_GE" => ordered(high, low, argument.value, BPF_JGE, (yes, no), (yes, no)),
        "SCMP_CMP_LT" => ordered(high, low, argument.value, BPF_JGE, (no, yes), (no, yes)),
        "SCMP_CMP_LE" => ordered(high, low, argument.value, BPF_JGT, (no, yes), (no, yes)),
        other => bail!("seccomp operator {other:?} is not known"),
    };
    Ok(code)
}

/// `high` greater or less decides; else `low` does. The targets are those of "greater" and "not greater".
fn ordered(
    high: u32,
    low: u32,
    value: u64,
    operator: u32,
    (greater, less): (u8, u8),
    (holds, fails): (u8, u8),
) -> Vec<sock_filter> {
    vec![
        load(high),
        jump(BPF_JGT, (value >> 32) as u32, greater + 3, 0),
        jump(BPF_JEQ, (value >> 32) as u32, 0, less + 2),
        load(low),
        jump(operator, value as u32, holds, fails),
    ]
}

fn errno(rule: &LinuxSyscall) -> Option<u32> {
    rule.has_errnoret().then(|| rule.errnoret())
}

fn action(name: &str, errno: Option<u32>) -> Result<u32> {
    let data = errno.unwrap_or(libc::EPERM as u32) & libc::SECCOMP_RET_DATA;
    Ok(match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => libc::SECCOMP_RET_KILL_THREAD,
        "SCMP_ACT_KILL_PROCESS" => libc::SECCOMP_RET_KILL_PROCESS,
        "SCMP_ACT_TRAP" => libc::SECCOMP_RET_TRAP,
        "SCMP_ACT_ERRNO" => libc::SECCOMP_RET_ERRNO | data,
        "SCMP_ACT_TRACE" => libc::SECCOMP_RET_TRACE | data,
        "SCMP_ACT_ALLOW" => libc::SECCOMP_RET_ALLOW,
        "SCMP_ACT_LOG" => libc::SECCOMP_RET_LOG,
        other => bail!("seccomp action {other:?} is not supported"),
    })
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn load(offset: u32) -> sock_filter {
    statement(BPF_LD | BPF_W | BPF_ABS, offset)
}

fn ret(action: u32) -> sock_filter {
    statement(BPF_RET | BPF_K, action)
}

fn jump(operator: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | operator | BPF_K) as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;

    /// The kernel's interpreter, as far as filters of ours go.
    fn run(filter: &Filter, audit: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = vec![0; 16];
        data[0..4].copy_from_slice(&number.to_ne_bytes());
        data[4..8].copy_from_slice(&audit.to_ne_bytes());
        data.extend(arguments.iter().flat_map(|argument| argument.to_ne_bytes()));
        let (mut at, mut accumulator) = (0, 0_u32);
        loop {
            let sock_filter { code, jt, jf, k } = filter.program[at];
            at += 1;
            let branch = |holds: bool| usize::from(if holds { jt } else { jf });
            match u32::from(code) {
                code if code == BPF_LD | BPF_W | BPF_ABS => {
                    let word = data[k as usize..k as usize + 4].try_into().unwrap();
                    accumulator = u32::from_ne_bytes(word);
                }
                code if code == BPF_ALU | BPF_AND | BPF_K => accumulator &= k,
                code if code == BPF_JMP | libc::BPF_JA => at += k as usize,
                code if code == BPF_JMP | BPF_JEQ | BPF_K => at += branch(accumulator == k),
                code if code == BPF_JMP | BPF_JGT | BPF_K => at += branch(accumulator > k),
                code if code == BPF_JMP | BPF_JGE | BPF_K => at += branch(accumulator >= k),
                code if code == BPF_RET | BPF_K => return k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn native(filter: &Filter, number: libc::c_long, first: u64, second: u64) -> u32 {
        run(filter, table::ABIS[0].audit, number as u32, [first, second, 0, 0, 0, 0])
    }

    fn rule(names: &[&str], action: &str, args: Vec<LinuxSeccompArg>) -> LinuxSyscall {
        LinuxSyscall {
            names: names.iter().map(ToString::to_string).collect(),
            action: action.into(),
            args,
            ..Default::default()
        }
    }

    fn argument(index: u64, op: &str, value: u64, value_two: u64) -> LinuxSeccompArg {
        LinuxSeccompArg { index, op: op.into(), value, value_two, ..Default::default() }
    }

    fn profile(default: &str, syscalls: Vec<LinuxSyscall>) -> LinuxSeccomp {
        LinuxSeccomp { default_action: default.into(), syscalls, ..Default::default() }
    }

    #[test]
    fn names_decide_and_the_rest_is_default() {
        let mut enosys = rule(&["clone3", "no_such_call"], "SCMP_ACT_ERRNO", vec![]);
        enosys.set_errnoret(libc::ENOSYS as u32);
        let rules = vec![rule(&["read", "write"], "SCMP_ACT_ALLOW", vec![]), enosys];
        let filter = Filter::compile(&profile("SCMP_ACT_ERRNO", rules)).unwrap();
        assert_eq!(native(&filter, libc::SYS_read, 0, 0), ALLOW);
        assert_eq!(native(&filter, libc::SYS_write, 0, 0), ALLOW);
        assert_eq!(native(&filter, libc::SYS_openat, 0, 0), EPERM);
        let enosys = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
        assert_eq!(native(&filter, libc::SYS_clone3, 0, 0), enosys);
        assert_eq!(native(&filter, libc::SYS_clone3 + 1, 0, 0), enosys, "newer than the profile");
        let foreign = run(&filter, 0x1234, libc::SYS_read as u32, [0; 6]);
        assert_eq!(foreign, libc::SECCOMP_RET_KILL_PROCESS);
    }

    #[test]
    fn every_operator_on_both_halves() {
        let big = 5 << 32 | 7;
        let around = [0, 6, 7, 8, big - 1, big, big + 1, 6 << 32, 4 << 32 | 9, u64::MAX];
        type Holds = fn(u64, u64) -> bool;
        let operators: [(&str, Holds); 6] = [
            ("SCMP_CMP_EQ", |a, b| a == b),
            ("SCMP_CMP_NE", |a, b| a != b),
            ("SCMP_CMP_GT", |a, b| a > b),
            ("SCMP_CMP_GE", |a, b| a >= b),
            ("SCMP_CMP_LT", |a, b| a < b),
            ("SCMP_CMP_LE", |a, b| a <= b),
        ];
        for (name, holds) in operators {
            for value in [7, big] {
                let rules =
                    vec![rule(&["read"], "SCMP_ACT_ALLOW", vec![argument(0, name, value, 0)])];
                let filter = Filter::compile(&profile("SCMP_ACT_ERRNO", rules)).unwrap();
                for actual in around {
                    let expected = if holds(actual, value) { ALLOW } else { EPERM };
                    let outcome = native(&filter, libc::SYS_read, actual, 0);
                    assert_eq!(outcome, expected, "{actual:#x} {name} {value:#x}");
                }
            }
        }
    }

    #[test]
    fn arguments_are_all_needed_and_the_same_one_is_an_alternative() {
        let both = vec![
            argument(0, "SCMP_CMP_EQ", 1, 0),
            argument(1, "SCMP_CMP_MASKED_EQ", 0xff00_0000_00ff, 0x1200_0000_0034),
            argument(0, "SCMP_CMP_EQ", 2, 0),
        ];
        let rules = vec![
            rule(&["read"], "SCMP_ACT_ALLOW", both),
            rule(&["read"], "SCMP_ACT_LOG", vec![argument(0, "SCMP_CMP_EQ", 3, 0)]),
            rule(&["write"], "SCMP_ACT_ALLOW", vec![]),
        ];
        let filter = Filter::compile(&profile("SCMP_ACT_ERRNO", rules)).unwrap();
        let good = 0x12aa_bbcc_dd34;
        assert_eq!(native(&filter, libc::SYS_read, 1, good), ALLOW);
        assert_eq!(native(&filter, libc::SYS_read, 2, good), ALLOW);
        assert_eq!(native(&filter, libc::SYS_read, 2, good + 1), EPERM);
        assert_eq!(native(&filter, libc::SYS_read, 4, good), EPERM);
        assert_eq!(native(&filter, libc::SYS_read, 3, 0), libc::SECCOMP_RET_LOG);
        assert_eq!(native(&filter, libc::SYS_write, 9, 9), ALLOW, "the number is loaded again");
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn thirty_two_bit_programs_have_their_own_numbers() {
        let mut profile =
            profile("SCMP_ACT_ERRNO", vec![rule(&["read"], "SCMP_ACT_ALLOW", vec![])]);
        profile.architectures = vec!["SCMP_ARCH_X86_64".into(), "SCMP_ARCH_X86".into()];
        let filter = Filter::compile(&profile).unwrap();
        assert_eq!(run(&filter, table::ABIS[1].audit, 3, [0; 6]), ALLOW);
        assert_eq!(run(&filter, table::ABIS[1].audit, 0, [0; 6]), EPERM);
        assert_eq!(native(&filter, libc::SYS_read, 0, 0), ALLOW);
    }

    #[test]
    fn nonsense_is_refused() {
        let wrong = [
            profile("SCMP_ACT_NOTIFY", vec![]),
            profile("SCMP_ACT_ALLOW", vec![rule(&["read"], "?", vec![])]),
            profile(
                "SCMP_ACT_ALLOW",
                vec![rule(&["read"], "SCMP_ACT_LOG", vec![argument(6, "SCMP_CMP_EQ", 0, 0)])],
            ),
            profile(
                "SCMP_ACT_ALLOW",
                vec![rule(
                    &["read"],
                    "SCMP_ACT_LOG",
                    vec![argument(0, "SCMP_CMP_MASKED_EQ", 1, 2); 64],
                )],
            ),
            profile("SCMP_ACT_ALLOW", vec![rule(&["read"; 4000], "SCMP_ACT_LOG", vec![])]),
        ];
        for profile in wrong {
            assert!(Filter::compile(&profile).is_err(), "{profile:?}");
        }
    }
}
