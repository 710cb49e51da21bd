// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::*;
use crate::io_thread::IoThread;

const PATIENCE: Duration = Duration::from_secs(20);

fn io_thread() -> IoThread {
    IoThread::spawn("test", Box::new(|why| panic!("{why}"))).unwrap()
}

/// Passes on what it receives and what it hears of the other side, as long as it has room.
struct Sink {
    input: mpsc::Sender<Vec<u8>>,
    open: mpsc::Sender<bool>,
    room: Arc<Mutex<usize>>,
}

impl CharSink for Sink {
    fn receive(&mut self, data: &[u8]) -> usize {
        let mut room = self.room.lock();
        let n = data.len().min(*room);
        *room -= n;
        if n > 0 {
            self.input.send(data[..n].to_vec()).unwrap();
        }
        n
    }

    fn opened(&mut self, open: bool) {
        let _ = self.open.send(open);
    }
}

struct Front {
    port: CharPort,
    input: mpsc::Receiver<Vec<u8>>,
    open: mpsc::Receiver<bool>,
    room: Arc<Mutex<usize>>,
}

impl Front {
    fn new(chardev: &Chardev, room: usize) -> Self {
        let (input_to, input) = mpsc::channel();
        let (open_to, open) = mpsc::channel();
        let room = Arc::new(Mutex::new(room));
        let sink = Sink { input: input_to, open: open_to, room: Arc::clone(&room) };
        let port = chardev.port();
        port.connect(Box::new(sink));
        Self { port, input, open, room }
    }

    fn expect_input(&self, mut expected: &[u8]) {
        while !expected.is_empty() {
            let got = self.input.recv_timeout(PATIENCE).expect("input");
            assert!(expected.starts_with(&got), "{got:?} is not the start of {expected:?}");
            expected = &expected[got.len()..];
        }
    }

    fn expect_open(&self, open: bool) {
        assert_eq!(self.open.recv_timeout(PATIENCE), Ok(open));
    }
}

fn client(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

fn expect_output(from: &mut impl Read, expected: &[u8]) {
    let mut got = vec![0; expected.len()];
    from.read_exact(&mut got).unwrap();
    assert_eq!(got, expected);
}

fn unix(path: &Path, thread: &IoThread) -> Chardev {
    Chardev::open(ChardevSpec::Unix { path: path.into() }, &thread.handle()).unwrap()
}

#[test]
fn null_drops_output_but_remembers_it() {
    let thread = io_thread();
    let chardev = Chardev::open(ChardevSpec::Null, &thread.handle()).unwrap();
    chardev.port().put(b"Kernel panic");
    assert_eq!((chardev.filename().as_str(), chardev.is_open()), ("null", false));
    assert_eq!(chardev.tail(), b"Kernel panic");
}

#[test]
fn the_tail_is_the_last_output() {
    let thread = io_thread();
    let chardev = Chardev::open(ChardevSpec::Null, &thread.handle()).unwrap();
    let port = chardev.port();
    port.put(&vec![b'a'; 3 * TAIL]);
    assert_eq!(chardev.tail(), vec![b'a'; TAIL]);
    port.put(b"end");
    assert_eq!(chardev.tail().len(), TAIL);
    assert!(chardev.tail().ends_with(b"aend"));
}

#[test]
fn bytes_go_both_ways_through_descriptors() {
    let thread = io_thread();
    let (their_input, mut keyboard) = io::pipe().unwrap();
    let (mut screen, their_output) = io::pipe().unwrap();
    let spec = ChardevSpec::Fds { input: Some(their_input.into()), output: their_output.into() };
    let chardev = Chardev::open(spec, &thread.handle()).unwrap();
    assert_eq!((chardev.filename().as_str(), chardev.is_open()), ("stdio", true));
    let front = Front::new(&chardev, usize::MAX);
    front.expect_open(true);
    keyboard.write_all(b"typed").unwrap();
    front.expect_input(b"typed");
    // The end of input leaves output alone.
    drop(keyboard);
    front.port.put(b"shown");
    expect_output(&mut screen, b"shown");
    drop(screen);
    front.expect_open(false);
}

#[test]
fn what_was_put_is_written_before_closing() {
    let thread = io_thread();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    fs::write(&path, "before ").unwrap();
    let spec = ChardevSpec::File { path: path.clone() };
    let chardev = Chardev::open(spec, &thread.handle()).unwrap();
    chardev.port().put(b"last words");
    drop(chardev);
    assert_eq!(fs::read_to_string(&path).unwrap(), "before last words");
}

#[test]
fn input_that_is_a_file_is_read_to_its_end() {
    let thread = io_thread();
    let mut file = tempfile::tempfile().unwrap();
    let text: Vec<u8> = (0..20_000u32).flat_map(u32::to_le_bytes).collect();
    file.write_all(&text).unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let output = tempfile::tempfile().unwrap();
    let spec = ChardevSpec::Fds { input: Some(file.into()), output: output.into() };
    let chardev = Chardev::open(spec, &thread.handle()).unwrap();
    Front::new(&chardev, usize::MAX).expect_input(&text);
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let thread = io_thread();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.sock");
    let chardev = unix(&path, &thread);
    let filename = format!("unix:{},server=on", path.display());
    assert_eq!(chardev.filename(), format!("disconnected:{filename}"));
    let front = Front::new(&chardev, usize::MAX);
    front.expect_open(false);
    front.port.put(b"nobody hears this");

    let mut first = client(&path);
    front.expect_open(true);
    assert_eq!(chardev.filename(), filename);
    let mut second = client(&path);
    second.write_all(b"from the second").unwrap();
    first.write_all(b"from the first").unwrap();
    front.expect_input(b"from the first");
    front.port.put(b"to the first");
    expect_output(&mut first, b"to the first");

    drop(first);
    front.expect_open(false);
    front.expect_open(true);
    front.expect_input(b"from the second");
    front.port.put(b"to the second");
    expect_output(&mut second, b"to the second");

    drop(chardev);
    assert_eq!(second.read(&mut [0]).unwrap(), 0);
    assert!(!path.exists());
}

#[test]
fn input_sent_before_leaving_arrives() {
    let thread = io_thread();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let chardev = unix(&path, &thread);
    let front = Front::new(&chardev, 0);
    let mut first = client(&path);
    first.write_all(b"poweroff\n").unwrap();
    drop(first);
    front.expect_open(false);
    front.expect_open(true);
    front.expect_open(false);
    *front.room.lock() = usize::MAX;
    front.port.resume();
    front.expect_input(b"poweroff\n");
}

#[test]
fn input_waits_for_room_and_a_stuck_guest_does_not_lock_out_the_next_client() {
    let thread = io_thread();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let chardev = unix(&path, &thread);
    let front = Front::new(&chardev, 3);
    let mut first = client(&path);
    first.write_all(b"abcdef").unwrap();
    front.expect_input(b"abc");
    *front.room.lock() = 2;
    front.port.resume();
    front.expect_input(b"de");
    drop(first);

    let mut second = client(&path);
    for open in [false, true, false, true] {
        front.expect_open(open);
    }
    second.write_all(b"fresh").unwrap();
    *front.room.lock() = usize::MAX;
    front.port.resume();
    front.expect_input(b"fresh");
}

#[test]
fn a_slow_client_costs_a_bounded_buffer_and_no_time() {
    let thread = io_thread();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let chardev = unix(&path, &thread);
    let front = Front::new(&chardev, 0);
    let mut slow = client(&path);
    front.expect_open(false);
    front.expect_open(true);
    for _ in 0..1000 {
        front.port.put(&[b'x'; 4096]);
        assert!(chardev.shared.output.lock().pending.len() <= PENDING);
    }
    // What was kept arrives once the client reads, and so does what comes later.
    let mut received = 0;
    let mut buffer = [0; 4096];
    slow.set_nonblocking(true).unwrap();
    // The last bytes may be here before the worker has taken them off its list.
    while received < PENDING || !chardev.shared.output.lock().pending.is_empty() {
        match slow.read(&mut buffer) {
            Ok(count) => received += count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
    slow.set_nonblocking(false).unwrap();
    front.port.put(b"!");
    while !buffer.contains(&b'!') {
        let n = slow.read(&mut buffer).unwrap();
        received += n;
    }
    assert!(received < 1000 * 4096, "nothing was dropped");
}

#[test]
fn says_what_is_wrong_with_a_path() {
    let thread = io_thread();
    let dir = tempfile::tempdir().unwrap();
    let spec = ChardevSpec::File { path: dir.path().into() };
    let error = Chardev::open(spec, &thread.handle()).unwrap_err();
    assert!(error.to_string().starts_with(&format!("open {:?} to append", dir.path())), "{error}");

    let path = dir.path().join("s");
    let _first = unix(&path, &thread);
    let error = Chardev::open(ChardevSpec::Unix { path }, &thread.handle()).unwrap_err();
    assert!(error.to_string().contains("in use by another process"), "{error}");
}
