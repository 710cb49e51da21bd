// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

use event_manager::{EventOps, EventSet, Events};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

/// Calls a closure when its eventfd is signalled, and says when it is quiesced and dropped.
struct Probe {
    kick: EventFd,
    on_event: Box<dyn FnMut() + Send>,
    log: mpsc::Sender<(&'static str, ThreadId)>,
}

impl Probe {
    fn new(
        on_event: impl FnMut() + Send + 'static,
    ) -> (Box<Self>, EventFd, mpsc::Receiver<(&'static str, ThreadId)>) {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let ours = kick.try_clone().unwrap();
        let (log, read) = mpsc::channel();
        (Box::new(Self { kick, on_event: Box::new(on_event), log }), ours, read)
    }

    fn say(&self, what: &'static str) {
        let _ = self.log.send((what, thread::current().id()));
    }
}

impl MutEventSubscriber for Probe {
    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(&self.kick, EventSet::IN)).unwrap();
        self.say("init");
    }
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        self.kick.read().unwrap();
        self.say("event");
        (self.on_event)();
    }
}

impl Worker for Probe {
    fn quiesce(&mut self) {
        self.say("quiesce");
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.say("drop");
    }
}

fn thread_that_must_not_fail(name: &str) -> IoThread {
    IoThread::spawn(name, Box::new(|why| panic!("io thread failed: {why}"))).unwrap()
}

#[test]
fn a_worker_lives_on_the_thread_until_it_is_removed() {
    let io = thread_that_must_not_fail("ecr-test");
    let (probe, kick, log) = Probe::new(|| {});
    let id = io.handle().add(probe).unwrap();
    let (what, on) = log.try_recv().unwrap();
    assert_eq!((what, on), ("init", io.handle.thread));
    kick.write(1).unwrap();
    assert_eq!(log.recv().unwrap(), ("event", io.handle.thread));

    let probe = io.handle().remove(id).unwrap();
    assert_eq!(log.try_recv().unwrap(), ("quiesce", io.handle.thread));
    kick.write(1).unwrap();
    // The thread answers in order, so this would come after an event that had been delivered.
    assert_eq!(
        io.handle().remove(id).unwrap_err(),
        IoThreadError::UnknownWorker(Arc::from("ecr-test"))
    );
    assert!(log.try_recv().is_err());
    drop(probe);
}

#[test]
fn the_thread_has_its_name_and_tid() {
    let io = thread_that_must_not_fail("ecr-io7");
    let comm = std::fs::read_to_string(format!("/proc/self/task/{}/comm", io.tid())).unwrap();
    assert_eq!(comm, "ecr-io7\n");
}

#[test]
fn dropping_the_thread_drops_its_workers_there() {
    let io = thread_that_must_not_fail("ecr-test");
    let (handle, on) = (io.handle(), io.handle.thread);
    let (probe, _kick, log) = Probe::new(|| {});
    let id = handle.add(probe).unwrap();
    drop(io);
    assert_eq!(log.iter().collect::<Vec<_>>(), [("init", on), ("drop", on)]);
    let ended = IoThreadError::Ended(Arc::from("ecr-test"));
    assert_eq!(handle.remove(id).unwrap_err(), ended);
    assert_eq!(handle.add(Probe::new(|| {}).0).unwrap_err(), ended);
}

#[test]
fn a_panic_is_reported_and_ends_only_the_thread() {
    let (report, why) = mpsc::channel();
    let io = IoThread::spawn("ecr-test", Box::new(move |text| report.send(text).unwrap())).unwrap();
    let (probe, kick, log) = Probe::new(|| panic!("queue {} is on fire", 3));
    let id = io.handle().add(probe).unwrap();
    kick.write(1).unwrap();
    assert_eq!(why.recv().unwrap(), "panic: queue 3 is on fire");
    assert_eq!(log.iter().last().unwrap().0, "drop");
    assert!(matches!(io.handle().remove(id), Err(IoThreadError::Ended(_))));
}

#[test]
fn a_worker_cannot_wait_for_its_own_thread() {
    let io = thread_that_must_not_fail("ecr-test");
    let handle = io.handle();
    let (answer, answered) = mpsc::channel();
    let (probe, kick, _log) = Probe::new(move || {
        answer.send(handle.add(Probe::new(|| {}).0)).unwrap();
    });
    io.handle().add(probe).unwrap();
    kick.write(1).unwrap();
    assert_eq!(
        answered.recv().unwrap().unwrap_err(),
        IoThreadError::OwnThread(Arc::from("ecr-test"))
    );
}
