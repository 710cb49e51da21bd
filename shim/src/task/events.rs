// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! Events for containerd, over ttrpc, in the order in which things happened. They wait in a bounded queue while
//! containerd is away; when it is full, the oldest that containerd can do without goes first.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use parking_lot::Mutex;
use protobuf::well_known_types::any::Any;
use protobuf::{MessageDyn, MessageField};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use ttrpc::r#async::transport::Socket;
use ttrpc::context;

use super::timestamp;

/// So many events wait for containerd.
const QUEUE: usize = 128;

/// How long containerd may take for one.
const DEADLINE: Duration = Duration::from_secs(5);

/// The pauses between attempts to reach it grow from the first to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The metadata key that names the namespace.
const NAMESPACE: &str = "containerd-namespace-ttrpc";

/// Tells containerd what happens. Clones share one queue.
#[derive(Clone)]
pub struct Publisher {
    shared: Arc<Shared>,
}

struct Shared {
    namespace: String,
    /// There is somebody to tell.
    listened_to: bool,
    queue: Mutex<Queue>,
    added: Notify,
    emptied: Notify,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<(u64, Envelope)>,
    next: u64,
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher")
            .field("namespace", &self.shared.namespace)
            .finish_non_exhaustive()
    }
}

impl Publisher {
    /// Publish to the containerd that listens on `address`. Without one (CRI-O gives none), events are only logged.
    pub fn start(namespace: &str, address: Option<String>) -> Self {
        let address = address.filter(|address| !address.is_empty());
        let shared = Arc::new(Shared {
            namespace: namespace.to_owned(),
            listened_to: address.is_some(),
            queue: Mutex::default(),
            added: Notify::new(),
            emptied: Notify::new(),
        });
        if let Some(address) = address {
            tokio::spawn(forward_all(shared.clone(), address));
        }
        Self { shared }
    }

    /// Tell of an event. Never waits.
    pub fn publish(&self, topic: &str, event: &dyn MessageDyn) {
        log::debug!("event {topic}");
        if !self.shared.listened_to {
            return;
        }
        let value = match event.write_to_bytes_dyn() {
            Ok(value) => value,
            Err(error) => return log::error!("encode event {topic}: {error}"),
        };
        let event = Any {
            type_url: event.descriptor_dyn().full_name().to_owned(),
            value,
            ..Default::default()
        };
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.shared.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(event),
            ..Default::default()
        };
        self.shared.queue.lock().add(envelope);
        self.shared.added.notify_one();
    }

    /// Wait until containerd has them all, but not for ever.
    pub async fn flush(&self, patience: Duration) {
        let empty = async {
            loop {
                let emptied = self.shared.emptied.notified();
                if self.shared.queue.lock().waiting.is_empty() {
                    return;
                }
                emptied.await;
            }
        };
        if timeout(patience, empty).await.is_err() {
            let lost = self.shared.queue.lock().waiting.len();
            log::warn!("{lost} events did not reach containerd within {patience:?}");
        }
    }
}

impl Queue {
    fn add(&mut self, envelope: Envelope) {
        if self.waiting.len() >= QUEUE {
            let dispensable = self.waiting.iter().position(|(_, event)| !is_needed(&event.topic));
            if let Some((_, event)) = self.waiting.remove(dispensable.unwrap_or(0)) {
                log::warn!("event {} is lost: {QUEUE} others wait for containerd", event.topic);
            }
        }
        self.waiting.push_back((self.next, envelope));
        self.next += 1;
    }

    /// The event with this number has been dealt with.
    fn done(&mut self, number: u64) {
        // It may have been dropped for another in the meantime.
        if self.waiting.front().is_some_and(|&(first, _)| first == number) {
            self.waiting.pop_front();
        }
    }
}

/// Does containerd act on it?
fn is_needed(topic: &str) -> bool {
    [topics::TASK_EXIT_EVENT_TOPIC, topics::TASK_OOM_EVENT_TOPIC, topics::TASK_DELETE_EVENT_TOPIC]
        .contains(&topic)
}

/// Forward one event after the other, each until containerd has it or refuses it.
async fn forward_all(shared: Arc<Shared>, address: String) {
    let path = address.strip_prefix("unix://").unwrap_or(&address);
    let mut client = None;
    let mut pause = PAUSES.0;
    loop {
        let next = shared.queue.lock().waiting.front().cloned();
        let Some((number, envelope)) = next else {
            shared.emptied.notify_waiters();
            shared.added.notified().await;
            continue;
        };
        let topic = envelope.topic.clone();
        match forward(&mut client, path, &shared.namespace, envelope).await {
            Ok(()) => {}
            Err(ttrpc::Error::RpcStatus(status)) if client.is_some() => {
                log::warn!("containerd refuses event {topic}: {}", status.message());
            }
            Err(error) => {
                log::debug!("event {topic} waits, containerd is away: {error}");
                client = None;
                sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
                continue;
            }
        }
        pause = PAUSES.0;
        shared.queue.lock().done(number);
    }
}

/// Forward one event, over the connection that there is or a new one. A connection that failed is given up.
async fn forward(
    client: &mut Option<EventsClient>,
    path: &str,
    namespace: &str,
    envelope: Envelope,
) -> ttrpc::Result<()> {
    let away = |error: &dyn fmt::Display| ttrpc::Error::Others(format!("{path}: {error}"));
    let connected = match client {
        Some(client) => client,
        None => {
            let stream = timeout(DEADLINE, UnixStream::connect(path))
                .await
                .map_err(|error| away(&error))?
                .map_err(|error| away(&error))?;
            client.insert(EventsClient::new(Client::new(Socket::from(stream))))
        }
    };
    let mut context = context::with_duration(DEADLINE);
    context.add(NAMESPACE.to_owned(), namespace.to_owned());
    let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
    let answer = timeout(DEADLINE, connected.forward(context, &request)).await;
    match answer {
        Ok(Ok(_)) => Ok(()),
        // A deadline says nothing about the event.
        Ok(Err(ttrpc::Error::RpcStatus(status)))
            if status.code() == ttrpc::Code::DEADLINE_EXCEEDED =>
        {
            Err(away(&status.message()))
        }
        Ok(Err(error)) => Err(error),
        Err(elapsed) => Err(away(&elapsed)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope(topic: &str) -> Envelope {
        Envelope { topic: topic.to_owned(), ..Default::default() }
    }

    #[test]
    fn exits_outlive_a_full_queue() {
        let mut queue = Queue::default();
        queue.add(envelope(topics::TASK_EXIT_EVENT_TOPIC));
        for _ in 0..3 * QUEUE {
            queue.add(envelope(topics::TASK_START_EVENT_TOPIC));
        }
        assert_eq!(queue.waiting.len(), QUEUE);
        assert_eq!(queue.waiting[0].1.topic, topics::TASK_EXIT_EVENT_TOPIC);
        for _ in 0..3 * QUEUE {
            queue.add(envelope(topics::TASK_EXIT_EVENT_TOPIC));
        }
        assert_eq!(queue.waiting.len(), QUEUE);
    }

    #[test]
    fn an_event_that_was_dropped_while_on_its_way_takes_no_other_with_it() {
        let mut queue = Queue::default();
        for _ in 0..=QUEUE {
            queue.add(envelope(topics::TASK_START_EVENT_TOPIC));
        }
        queue.done(0);
        assert_eq!(queue.waiting.len(), QUEUE);
        queue.done(1);
        assert_eq!(queue.waiting.len(), QUEUE - 1);
    }
}
