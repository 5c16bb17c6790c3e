//! Connections: HTTP/1.1 over a Unix socket, with limits on what a slow or idle client can hold.

use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

/// Most connections at a time. A client beyond that is told to come again.
const CONNECTIONS: usize = 8192;
/// How long a client may take to send a request's head; also how long a connection may lie idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest head of a request (bytes).
const HEAD: usize = 64 << 10;
/// How long requests at hand may take when the daemon ends.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves connections.
pub struct Server {
    stop: watch::Sender<bool>,
    task: JoinHandle<JoinSet<()>>,
}

impl Server {
    /// Starts to serve; the listener is non-blocking.
    pub fn start(listener: StdListener, router: Router) -> Self {
        let (stop, stopped) = watch::channel(false);
        Self {
            stop,
            task: tokio::spawn(accept(listener, router, stopped)),
        }
    }

    /// Takes no more connections and no more requests on those that are open.
    pub fn stop_accepting(&self) {
        self.stop.send_replace(true);
    }

    /// Waits until the requests at hand are answered, but not for ever.
    pub async fn finish(self) {
        let Ok(mut connections) = self.task.await else {
            return;
        };
        let all = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(FINISH_TIMEOUT, all).await.is_err() {
            tracing::warn!(connections = connections.len(), "requests were cut off");
        }
    }
}

async fn accept(listener: StdListener, router: Router, stop: watch::Receiver<bool>) -> JoinSet<()> {
    let mut connections = JoinSet::new();
    let listener = match UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "cannot listen");
            return connections;
        }
    };
    let mut stopping = std::pin::pin!(told(stop.clone()));
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => match room.clone().try_acquire_owned() {
                    Ok(permit) => drop(connections.spawn(serve(stream, router.clone(), stop.clone(), permit))),
                    Err(_) => drop(connections.spawn(refuse(stream))),
                },
                Err(error) => {
                    // Out of descriptors, most likely: wait until some connection ends instead of spinning.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
            () = stopping.as_mut() => return connections,
        }
    }
}

/// Ends when the server is told to stop.
async fn told(mut stop: watch::Receiver<bool>) {
    drop(stop.wait_for(|stop| *stop).await);
}

async fn serve(
    stream: UnixStream,
    router: Router,
    stop: watch::Receiver<bool>,
    _permit: OwnedSemaphorePermit,
) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let mut stopped = std::pin::pin!(told(stop));
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = stopped.as_mut() => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

async fn refuse(mut stream: UnixStream) {
    const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\n\
        connection: close\r\nretry-after: 1\r\ncontent-length: 132\r\n\r\n\
        {\"type\":\"urn:shoal:problem:busy\",\"title\":\"Too many connections\",\"status\":503,\
        \"detail\":\"the daemon serves 8192 connections already\"}\n";
    // A client that does not read it has lost nothing.
    let _ = tokio::time::timeout(HEAD_TIMEOUT, stream.write_all(FULL)).await;
}
