/* A load generator that costs next to nothing: it sends one prepared frame over and over.
 *
 *   load closed FRAME HOST PORT CONNECTIONS SECONDS     each connection waits for its answer before it sends again
 *   load delivery PRODUCE FETCH AT HOST PORT COUNT OFFSET
 *                                                       a fetch waits at the log's end, a produce wakes it, COUNT times;
 *                                                       AT is where the fetch offset lies in its frame
 * FRAME files hold whole requests with their size in front. It prints one line of JSON.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

typedef struct {
  int fd;
  size_t sent;
  int64_t need; /* bytes of the answer that are still to come; -1: its size is not known yet */
  unsigned char head[4];
  int head_length;
  double started;
} Connection;

static unsigned char *frame;
static size_t frame_length;
static char *scratch;
enum { SCRATCH = 4 << 20, MAX_SAMPLES = 8 << 20 };
static float *samples;
static size_t sample_count;
static uint64_t bytes_in;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static void die(const char *what) {
  perror(what);
  exit(1);
}

static unsigned char *read_file(const char *path, size_t *length) {
  FILE *file = fopen(path, "rb");
  if (!file) die(path);
  fseek(file, 0, SEEK_END);
  *length = ftell(file);
  rewind(file);
  unsigned char *data = malloc(*length);
  if (fread(data, 1, *length, file) != *length) die("read");
  fclose(file);
  return data;
}

static int connect_to(const char *host, int port) {
  int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1;
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
  inet_pton(AF_INET, host, &address.sin_addr);
  if (connect(fd, (struct sockaddr *)&address, sizeof address)) die("connect");
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  return fd;
}

static int compare(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static void report(double seconds) {
  qsort(samples, sample_count, sizeof *samples, compare);
  printf("{\"count\": %zu, \"seconds\": %.6f, \"p50_us\": %.1f, \"p99_us\": %.1f, \"bytes_in\": %llu}\n", sample_count,
         seconds, samples[sample_count / 2] * 1e6, samples[(size_t)(sample_count * 0.99)] * 1e6,
         (unsigned long long)bytes_in);
}

static void keep_sending(Connection *c) {
  while (c->sent < frame_length) {
    ssize_t n = write(c->fd, frame + c->sent, frame_length - c->sent);
    if (n < 0) {
      if (errno == EAGAIN) return;
      die("write");
    }
    c->sent += n;
  }
}

static void begin(Connection *c) {
  c->sent = 0;
  c->need = -1;
  c->head_length = 0;
  c->started = now();
  keep_sending(c);
}

/* Whether the whole answer has come. */
static int keep_reading(Connection *c) {
  for (;;) {
    ssize_t n;
    if (c->need < 0) {
      n = read(c->fd, c->head + c->head_length, 4 - c->head_length);
      if (n > 0 && (c->head_length += n) == 4) {
        uint32_t size;
        memcpy(&size, c->head, 4);
        c->need = ntohl(size);
      }
    } else {
      n = read(c->fd, scratch, c->need < SCRATCH ? (size_t)c->need : SCRATCH);
      if (n > 0) {
        c->need -= n;
        bytes_in += n;
      }
    }
    if (n == 0) {
      fprintf(stderr, "the broker closed the connection\n");
      exit(1);
    }
    if (n < 0) {
      if (errno == EAGAIN) return 0;
      die("read");
    }
    if (c->need == 0) return 1;
  }
}

static void closed(const char *host, int port, int count, double seconds) {
  int epoll = epoll_create1(0);
  Connection *connections = calloc(count, sizeof *connections);
  for (int i = 0; i < count; i++) {
    Connection *c = &connections[i];
    c->fd = connect_to(host, port);
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
    epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event);
  }
  double start = now(), end = start + seconds;
  for (int i = 0; i < count; i++) begin(&connections[i]);
  struct epoll_event events[256];
  while (now() < end) {
    int n = epoll_wait(epoll, events, 256, 100);
    for (int i = 0; i < n; i++) {
      Connection *c = events[i].data.ptr;
      if (c->sent < frame_length) keep_sending(c);
      while (keep_reading(c)) {
        if (sample_count < MAX_SAMPLES) samples[sample_count++] = now() - c->started;
        begin(c);
      }
    }
  }
  report(now() - start);
}

static void write_all(int fd, const unsigned char *data, size_t length) {
  while (length) {
    ssize_t n = write(fd, data, length);
    if (n < 0) die("write");
    data += n;
    length -= n;
  }
}

static void read_answer(int fd) {
  Connection c = {.fd = fd, .need = -1};
  while (!keep_reading(&c)) {
  }
}

static void delivery(const char *fetch_path, long at, const char *host, int port, int count, int64_t offset) {
  size_t length;
  unsigned char *fetch = read_file(fetch_path, &length);
  int consumer = connect_to(host, port), producer = connect_to(host, port);
  double start = now();
  for (int i = 0; i < count; i++) {
    uint64_t place = htobe64(offset + i);
    memcpy(fetch + at, &place, 8);
    write_all(consumer, fetch, length);
    usleep(500); /* the fetch is waiting now */
    double sent = now();
    write_all(producer, frame, frame_length);
    read_answer(consumer);
    samples[sample_count++] = now() - sent;
    read_answer(producer);
  }
  report(now() - start);
}

int main(int argc, char **argv) {
  if (argc < 7) return 2;
  scratch = malloc(SCRATCH);
  samples = malloc(MAX_SAMPLES * sizeof *samples);
  frame = read_file(argv[2], &frame_length);
  if (!strcmp(argv[1], "closed"))
    closed(argv[3], atoi(argv[4]), atoi(argv[5]), atof(argv[6]));
  else
    delivery(argv[3], atol(argv[4]), argv[5], atoi(argv[6]), atoi(argv[7]), atoll(argv[8]));
  return 0;
}
