//! HTTP to the daemon, one connection per request.

use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use shoal_api_types::Problem;
use tokio::net::UnixStream;

/// Talks to one daemon.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the daemon at `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    async fn connect(&self) -> Result<UnixStream> {
        let path = &self.socket;
        UnixStream::connect(path).await.map_err(|error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => anyhow!(
                "no daemon listens at {path:?}; start one with: shoald --socket {} --state DIR &\n  \
                 (--socket or SHOAL_SOCKET names another socket)",
                path.display()
            ),
            ErrorKind::PermissionDenied => {
                anyhow!("the daemon's socket {path:?} may not be used by this user; join its group, or ask as root")
            }
            _ => anyhow::Error::new(error).context(format!("connecting to the daemon at {path:?}")),
        })
    }

    /// Sends a request; an answer other than success becomes an error that holds the [`Problem`].
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        media_type: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>> {
        let stream = TokioIo::new(self.connect().await?);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
        // It ends with the answer; what goes wrong with it is told by the answer's future.
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "shoal");
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, media_type);
        }
        let request = request
            .body(Full::new(Bytes::from(body)))
            .context("making the request")?;
        let answer = sender
            .send_request(request)
            .await
            .context("the daemon did not answer")?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let body = answer
            .into_body()
            .collect()
            .await
            .context("reading the daemon's answer")?
            .to_bytes();
        let problem = serde_json::from_slice::<Problem>(&body);
        Err(problem.map_or_else(|_| anyhow!("the daemon answered {status}"), anyhow::Error::new))
    }

    async fn json<T: DeserializeOwned>(&self, method: Method, path: &str, body: Vec<u8>) -> Result<T> {
        let answer = self.send(method, path, "application/json", body).await?;
        let bytes = answer
            .into_body()
            .collect()
            .await
            .context("reading the daemon's answer")?
            .to_bytes();
        serde_json::from_slice(&bytes)
            .context("the daemon's answer is not what this program expects; are their versions the same?")
    }

    /// GET.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.json(Method::GET, path, Vec::new()).await
    }

    /// POST.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.json(Method::POST, path, serde_json::to_vec(body)?).await
    }

    /// PATCH.
    pub async fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        self.json(Method::PATCH, path, serde_json::to_vec(body)?).await
    }

    /// DELETE.
    pub async fn delete(&self, path: &str) -> Result<()> {
        self.send(Method::DELETE, path, "", Vec::new()).await.map(drop)
    }
}

/// A guest's path; `guest` is what the user typed.
pub fn guest_path(guest: &str, rest: &str) -> String {
    use std::fmt::Write;
    let mut path = String::from("/v1/guests/");
    for byte in guest.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => path.push(byte as char),
            // Writing to a String cannot fail.
            other => drop(write!(path, "%{other:02X}")),
        }
    }
    path + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_was_typed_in_its_place() {
        assert_eq!(guest_path("web-1", "/start"), "/v1/guests/web-1/start");
        assert_eq!(guest_path("a/b?c d\n", ""), "/v1/guests/a%2Fb%3Fc%20d%0A");
    }
}
