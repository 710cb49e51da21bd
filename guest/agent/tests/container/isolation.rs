// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a container sees, and what it may not.

use std::fs;

use ecr_agent_protocol::oci;
use protobuf::MessageField;

use crate::harness::{Agent, mount, process};

#[tokio::test]
async fn mounts_and_paths() {
    let Some(agent) = Agent::start().await else { return };
    let script = "
        cat /proc/1/comm; ls /proc | grep -c '^[0-9]*$'
        echo x > /ro/file || echo bind is read-only
        echo x > /rw/file && cat /rw/file
        cat /one; ls -l /dev/null | cut -c1; readlink /dev/fd
        echo x > /root-file || echo root is read-only
        echo 1 > /proc/sys/kernel/sysrq || echo parameters are read-only
        head -c 1 /proc/kcore | wc -c
        ls /data; df -k /tmp | tail -n 1 | cut -d' ' -f1
        cat /proc/self/cgroup; ls /sys/fs/cgroup/cgroup.procs
        mkdir /sys/fs/cgroup/x || echo cgroups are read-only
        cat /proc/sys/kernel/shmmni
        test -c /dev/mine && stat -c '%a %u %t:%T' /dev/mine";
    let source = agent.dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("one"), "one\n").unwrap();
    let source = source.to_str().unwrap();
    let mut spec = agent.spec("c1", &format!("exec 2>/dev/null\n{script}"));
    spec.mounts.extend([
        mount("/ro", "bind", source, &["rbind", "ro"]),
        mount("/rw", "bind", source, &["rbind", "rprivate"]),
        mount("/one", "bind", &format!("{source}/one"), &["bind", "ro"]),
        mount("/tmp", "tmpfs", "tmpfs", &["size=1m"]),
    ]);
    spec.root.mut_or_insert_default().readonly = true;
    let linux = spec.linux.mut_or_insert_default();
    linux.masked_paths.push("/data".into());
    linux.sysctl.insert("kernel.shmmni".into(), "77".into());
    linux.devices.push(oci::LinuxDevice {
        path: "/dev/mine".into(),
        type_: "c".into(),
        major: 1,
        minor: 3,
        file_mode: 0o600,
        uid: 7,
        ..Default::default()
    });
    let (status, stdout, _) = agent.run("c1", spec).await;
    let expected = "sh\n3\nbind is read-only\nx\none\nc\n/proc/self/fd\nroot is read-only\n\
        parameters are read-only\n0\ntmpfs\n0::/\n/sys/fs/cgroup/cgroup.procs\n\
        cgroups are read-only\n77\n600 7 1:3\n";
    let stdout: String = stdout
        .lines()
        .filter(|line| !line.contains(":/") || line.starts_with("0::"))
        .map(|line| format!("{line}\n"))
        .collect();
    assert_eq!((status, stdout.as_str()), (0, expected));
}

#[tokio::test]
async fn users_capabilities_and_limits() {
    let Some(agent) = Agent::start().await else { return };
    let script = "id; umask; ulimit -n; cat /proc/self/oom_score_adj; echo $HOME
        grep -E '^(CapBnd|CapEff|CapPrm|CapAmb|NoNewPrivs|Seccomp):' /proc/self/status
        echo again > /dev/stdout; ls /proc/self/fd | wc -l";
    let mut spec = agent.spec("c1", script);
    let process = spec.process.mut_or_insert_default();
    process.user = MessageField::some(oci::User {
        uid: 1000,
        gid: 1000,
        additional_gids: vec![5, 6],
        ..Default::default()
    });
    process.no_new_privileges = true;
    process.oom_score_adj = 123;
    process.rlimits = vec![oci::POSIXRlimit {
        type_: "RLIMIT_NOFILE".into(),
        soft: 100,
        hard: 200,
        ..Default::default()
    }];
    let capabilities = process.capabilities.mut_or_insert_default();
    let one = vec!["CAP_KILL".to_string()];
    capabilities.inheritable = one.clone();
    capabilities.ambient = one;
    let (status, stdout, stderr) = agent.run("c1", spec).await;
    let expected = "uid=1000(user) gid=1000 groups=5,6\n0022\n100\n123\n/home/user\n\
        CapPrm:\t0000000000000020\nCapEff:\t0000000000000020\nCapBnd:\t00000000080000e1\n\
        CapAmb:\t0000000000000020\nNoNewPrivs:\t1\nSeccomp:\t0\nagain\n4\n";
    assert_eq!((status, stderr.as_str()), (0, ""));
    assert_eq!(stdout.replace("groups=1000,5,6", "groups=5,6"), expected);
}

#[tokio::test]
async fn system_call_filters() {
    let Some(agent) = Agent::start().await else { return };
    let rule = |names: &[&str], args| oci::LinuxSyscall {
        names: names.iter().map(ToString::to_string).collect(),
        action: "SCMP_ACT_ERRNO".into(),
        args,
        ..Default::default()
    };
    // Signal 0 to oneself only.
    let argument =
        oci::LinuxSeccompArg { index: 1, op: "SCMP_CMP_NE".into(), ..Default::default() };
    let profile = oci::LinuxSeccomp {
        default_action: "SCMP_ACT_ALLOW".into(),
        architectures: vec!["SCMP_ARCH_X86_64".into(), "SCMP_ARCH_X86".into()],
        syscalls: vec![rule(&["mkdir", "mkdirat"], vec![]), rule(&["kill"], vec![argument])],
        ..Default::default()
    };
    let script =
        "grep '^Seccomp:' /proc/self/status; mkdir /tmp/x; kill -0 $$ && echo alive; kill -CONT $$";
    for no_new_privileges in [false, true] {
        let mut spec = agent.spec("c1", script);
        spec.process.mut_or_insert_default().no_new_privileges = no_new_privileges;
        spec.linux.mut_or_insert_default().seccomp = MessageField::some(profile.clone());
        let (status, stdout, stderr) = agent.run("c1", spec).await;
        assert_eq!((status, stdout.as_str()), (1, "Seccomp:\t2\nalive\n"), "{stderr}");
        assert_eq!(stderr.matches("Operation not permitted").count(), 2, "{stderr}");
    }
    // It holds for processes beside the first too.
    let mut spec = agent.spec("c1", "exec sleep 1000");
    spec.linux.mut_or_insert_default().seccomp = MessageField::some(profile);
    agent.create("c1", spec).await.unwrap();
    agent.start_container("c1").await.unwrap();
    agent.exec("c1", "e1", process(&["mkdir", "/tmp/y"])).await.unwrap();
    assert_eq!(agent.wait("c1", "e1").await, 1);
    agent.remove("c1").await.unwrap();
}

#[tokio::test]
async fn links_in_an_image_do_not_lead_out() {
    let Some(agent) = Agent::start().await else { return };
    let outside = agent.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, agent.rootfs.join("link")).unwrap();
    let mut spec = agent.spec("c1", "echo x > /link/mounted/file");
    let destination = "/link/mounted";
    spec.mounts.push(mount(destination, "tmpfs", "tmpfs", &[]));
    let (status, ..) = agent.run("c1", spec).await;
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    // What the link names has been made inside.
    assert_eq!(status, 0);
}
