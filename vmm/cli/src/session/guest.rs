//! A way to the agent from any thread: signals for the container, and what a snapshot needs of it.
//!
//! All that is said on the control connection goes through here, under one lock with [`Dialogue`]: so nothing is said out of turn, whoever
//! says it. What the agent says is read by the session's own thread, which notes it here.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use protocol::{Dialogue, FromAgent, Pause, Stage, ToAgent, Violation, write_message};

/// The agent of one machine. Clones are the same.
#[derive(Clone, Default)]
pub struct Guest(Arc<Shared>);

#[derive(Default)]
struct Shared {
    talk: Mutex<Talk>,
    /// Rung when the dialogue has moved, or ended.
    moved: Condvar,
}

#[derive(Default)]
struct Talk {
    dialogue: Dialogue,
    control: Option<UnixStream>,
    /// Nothing is heard any more.
    over: bool,
}

impl Talk {
    /// Sends `message`; `false` when it has no place here, or the agent is out of reach.
    fn say(&mut self, message: &ToAgent) -> bool {
        let Some(control) = &mut self.control else { return false };
        self.dialogue.say(message) && write_message(control, message).is_ok()
    }

    fn is_over(&self) -> bool {
        self.over || self.dialogue.stage == Stage::Over
    }
}

impl Guest {
    /// Sends `message`; `false` when it has no place at this time (a signal before there is a container), or the agent is out of reach.
    pub fn send(&self, message: &ToAgent) -> bool {
        self.talk().say(message)
    }

    /// Has the container frozen: when this returns, none of its processes runs until [`thaw`](Self::thaw), here, or in a copy until
    /// the copy's session has given it another identity. Waits for a container that is about to start.
    ///
    /// # Errors
    /// With a line for a person when there is no container, or it is not frozen within `patience`: then it is as if nothing had been asked.
    pub fn freeze(&self, patience: Duration) -> Result<(), String> {
        let deadline = Instant::now().checked_add(patience);
        let talk = self.talk();
        // Also for a copy that is about to become another.
        let mut talk = self.wait_while(talk, deadline, |talk| {
            talk.dialogue.stage != Stage::Running || talk.dialogue.pause == Pause::Identifying
        });
        if talk.is_over() {
            return Err("the container has ended".into());
        }
        if talk.dialogue.stage != Stage::Running {
            return Err("the container has not started yet: try again when it has".into());
        }
        if talk.dialogue.pause != Pause::No {
            return Err("the container is being frozen, or is frozen, already".into());
        }
        if !talk.say(&ToAgent::Freeze) {
            return Err("the agent in the guest does not listen".into());
        }
        let mut talk = self.wait_while(talk, deadline, |talk| talk.dialogue.pause == Pause::Asked);
        if talk.is_over() {
            return Err("the container has ended".into());
        }
        if talk.dialogue.pause == Pause::Frozen {
            return Ok(());
        }
        talk.say(&ToAgent::Thaw);
        Err(format!("the container was not frozen within {} s", patience.as_secs_f32()))
    }

    /// Lets a frozen container run again. Nothing where there is none.
    pub fn thaw(&self) {
        self.send(&ToAgent::Thaw);
    }

    /// Asks for an orderly end: the container's main process gets SIGTERM, after three seconds SIGKILL, and then the machine ends. `false`
    /// when there is no agent to ask.
    pub fn shutdown(&self) -> bool {
        self.send(&ToAgent::Shutdown)
    }

    /// The agent can be reached by `control` from now on, and this is where the session with it stands.
    pub(super) fn connect(&self, control: UnixStream, dialogue: Dialogue) {
        *self.talk() = Talk { dialogue, control: Some(control), over: false };
    }

    /// Notes what the agent says.
    pub(super) fn heard(&self, message: &FromAgent) -> Result<(), Violation> {
        let noted = self.talk().dialogue.heard(message);
        self.0.moved.notify_all();
        noted
    }

    /// Nobody listens to the agent any more.
    pub(super) fn end(&self) {
        let mut talk = self.talk();
        talk.control = None;
        talk.over = true;
        drop(talk);
        self.0.moved.notify_all();
    }

    fn talk(&self) -> MutexGuard<'_, Talk> {
        self.0.talk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits as long as `pending` holds, but not past the deadline, or the session's end.
    fn wait_while<'a>(
        &self,
        mut talk: MutexGuard<'a, Talk>,
        deadline: Option<Instant>,
        pending: impl Fn(&Talk) -> bool,
    ) -> MutexGuard<'a, Talk> {
        while pending(&talk) && !talk.is_over() {
            let left = deadline.map_or(Duration::MAX, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                break;
            }
            // A wait of centuries is not one that every clock can express.
            let left = left.min(Duration::from_secs(3600));
            talk = self.0.moved.wait_timeout(talk, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        talk
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use protocol::{ExitStatus, read_message};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A guest in `stage`, and its agent's end.
    fn guest(stage: Stage) -> (Guest, UnixStream) {
        let (ours, agents) = UnixStream::pair().unwrap();
        let guest = Guest::default();
        guest.connect(ours, Dialogue { stage, pause: Pause::No });
        (guest, agents)
    }

    fn asked(agent: &mut UnixStream) -> ToAgent {
        read_message(agent).unwrap().unwrap()
    }

    #[test]
    fn frozen_and_thawed() {
        let (guest, mut agent) = guest(Stage::Running);
        for _ in 0..2 {
            let freezing = thread::spawn({
                let guest = guest.clone();
                move || guest.freeze(PATIENCE)
            });
            assert_eq!(asked(&mut agent), ToAgent::Freeze);
            assert!(guest.freeze(PATIENCE).unwrap_err().contains("already"));
            guest.heard(&FromAgent::Frozen).unwrap();
            assert_eq!(freezing.join().unwrap(), Ok(()));
            guest.thaw();
            assert_eq!(asked(&mut agent), ToAgent::Thaw);
        }
    }

    #[test]
    fn a_freeze_waits_for_the_container_to_start() {
        let (guest, mut agent) = guest(Stage::Asked);
        let freezing = thread::spawn({
            let guest = guest.clone();
            move || guest.freeze(PATIENCE)
        });
        guest.heard(&FromAgent::Started { pid: 2 }).unwrap();
        assert_eq!(asked(&mut agent), ToAgent::Freeze);
        guest.heard(&FromAgent::Exited(ExitStatus::Code(0))).unwrap();
        assert!(freezing.join().unwrap().unwrap_err().contains("ended"));
        assert!(guest.freeze(PATIENCE).unwrap_err().contains("ended"));
    }

    #[test]
    fn patience_ends() {
        let (guest, _agent) = guest(Stage::Ready);
        assert!(guest.freeze(Duration::ZERO).unwrap_err().contains("not started"));
        let (guest, mut agent) = self::guest(Stage::Running);
        assert!(guest.freeze(Duration::from_millis(1)).unwrap_err().contains("within 0.001 s"));
        assert_eq!([asked(&mut agent), asked(&mut agent)], [ToAgent::Freeze, ToAgent::Thaw]);
        // Until the agent has answered, what it says could be meant for the first.
        assert!(guest.freeze(PATIENCE).unwrap_err().contains("already"));
        guest.heard(&FromAgent::Frozen).unwrap();
        assert!(guest.freeze(Duration::ZERO).unwrap_err().contains("within"));
    }

    #[test]
    fn nobody_there() {
        let guest = Guest::default();
        assert!(!guest.shutdown() && !guest.send(&ToAgent::Signal(1)));
        guest.thaw();
        assert!(guest.freeze(Duration::ZERO).is_err());
        let (guest, agent) = self::guest(Stage::Running);
        drop(agent);
        assert!(guest.freeze(PATIENCE).unwrap_err().contains("listen"));
        guest.end();
        assert!(guest.freeze(PATIENCE).unwrap_err().contains("ended"));
        assert!(!guest.shutdown());
    }
}
