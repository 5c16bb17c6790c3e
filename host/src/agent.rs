//! The host's side of the line to the guest's init: it connects to port 1024 and says `READY` and `EXIT CODE`; the
//! host says `STOP`. Everything it says is the guest's word and bounded.

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// The port that init connects to on the host.
pub(crate) const PORT: u32 = 1024;
/// Longest line that is read (bytes); a longer one ends the connection.
const LINE: u64 = 256;

/// What a guest said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// Its init is ready.
    Ready,
    /// Its workload has ended with this exit code.
    Exit(i32),
}

/// Serves the line; a new connection replaces the one before.
#[derive(Debug)]
pub(crate) struct Agent {
    words: mpsc::Sender<Word>,
    stop: watch::Receiver<bool>,
    task: Option<JoinHandle<()>>,
}

impl Agent {
    /// Sends what the guest says to `words`; asks the guest to stop when `stop` is true.
    pub fn new(words: mpsc::Sender<Word>, stop: watch::Receiver<bool>) -> Self {
        Self {
            words,
            stop,
            task: None,
        }
    }

    /// Serves a new connection.
    pub fn connected(&mut self, stream: UnixStream) {
        self.hang_up();
        self.task = Some(tokio::spawn(serve(stream, self.words.clone(), self.stop.clone())));
    }

    fn hang_up(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.hang_up();
    }
}

async fn serve(stream: UnixStream, words: mpsc::Sender<Word>, mut stop: watch::Receiver<bool>) {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    let ask = async {
        if stop.wait_for(|stop| *stop).await.is_ok() && write.write_all(b"STOP\n").await.is_err() {
            tracing::debug!("the guest hung up before it could be asked to stop");
        }
        // The connection lives until the guest hangs up.
        std::future::pending::<()>().await;
    };
    let listen = async {
        let mut line = Vec::new();
        loop {
            line.clear();
            match (&mut read).take(LINE).read_until(b'\n', &mut line).await {
                Ok(_) if line.last() == Some(&b'\n') => {}
                _ => return,
            }
            // A word that nobody knows is left to later versions.
            if let Some(word) = parse(&line)
                && words.send(word).await.is_err()
            {
                return;
            }
        }
    };
    tokio::select! { () = ask => {}, () = listen => {} }
}

fn parse(line: &[u8]) -> Option<Word> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    match words.next()? {
        "READY" => Some(Word::Ready),
        "EXIT" => Some(Word::Exit(words.next()?.parse().ok()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn hears_words_and_says_stop() {
        let (sender, mut words) = mpsc::channel(16);
        let stop = watch::Sender::new(false);
        let mut agent = Agent::new(sender, stop.subscribe());
        let (guest, host) = UnixStream::pair().unwrap();
        agent.connected(host);
        let (read, mut write) = guest.into_split();
        write.write_all(b"READY 123\nWHAT\n\xff\nEXIT 7\n").await.unwrap();
        assert_eq!(words.recv().await, Some(Word::Ready));
        assert_eq!(words.recv().await, Some(Word::Exit(7)));
        stop.send_replace(true);
        let mut line = String::new();
        BufReader::new(read).read_line(&mut line).await.unwrap();
        assert_eq!(line, "STOP\n");
    }

    #[tokio::test]
    async fn drops_a_guest_that_never_ends_its_line_and_serves_the_next() {
        let (sender, mut words) = mpsc::channel(16);
        let stop = watch::Sender::new(false);
        let mut agent = Agent::new(sender, stop.subscribe());
        let (mut guest, host) = UnixStream::pair().unwrap();
        agent.connected(host);
        guest.write_all(&[b'x'; 300]).await.unwrap();
        let mut rest = Vec::new();
        // Bytes that were not read make the end a reset.
        let _ = guest.read_to_end(&mut rest).await;
        assert!(rest.is_empty());
        let (mut guest, host) = UnixStream::pair().unwrap();
        agent.connected(host);
        guest.write_all(b"READY\n").await.unwrap();
        assert_eq!(words.recv().await, Some(Word::Ready));
    }
}
