import java.util.*;
import java.util.stream.*;

/** Work for HotSpot: interpreter, both compilers, deoptimisation, threads, garbage collection. */
public class Work {
    interface Shape { double area(); }
    record Square(double s) implements Shape { public double area() { return s * s; } }
    record Circle(double r) implements Shape { public double area() { return 3 * r * r; } }
    record Strip(double a, double b) implements Shape { public double area() { return a * b; } }

    static double sum(List<Shape> shapes) {
        double s = 0;
        for (Shape x : shapes) s += x.area();
        return s;
    }

    public static void main(String[] args) throws Exception {
        List<Shape> shapes = new ArrayList<>();
        double expected = 0;
        for (int i = 0; i < 3000; i++) {
            // The call's targets become more while it is hot.
            shapes.add(i < 1000 ? new Square(2) : i < 2000 ? new Circle(1) : new Strip(2, 3));
            expected += i < 1000 ? 4 : i < 2000 ? 3 : 6;
            if (i % 100 == 0) for (int k = 0; k < 20; k++) sum(shapes);
        }
        if (sum(shapes) != expected) throw new AssertionError("shapes");
        long h = 0;
        for (int i = 0; i < 20_000_000; i++) h = h * 31 + (i ^ (h >>> 7));
        Map<String, Integer> words = new HashMap<>();
        for (int i = 0; i < 200_000; i++) words.merge("w" + i * 7919L % 5003, 1, Integer::sum);
        if (words.size() != 5003) throw new AssertionError("words");
        long even = IntStream.range(0, 1_000_000).parallel().filter(i -> i % 2 == 0).count();
        if (even != 500_000) throw new AssertionError("streams");
        Thread[] threads = new Thread[4];
        long[] out = new long[4];
        for (int t = 0; t < 4; t++) {
            int id = t;
            threads[t] = new Thread(() -> { for (int i = 0; i < 100_000; i++) out[id] += new int[16].length; });
            threads[t].start();
        }
        for (Thread t : threads) t.join();
        for (long o : out) if (o != 1_600_000) throw new AssertionError("threads");
        try {
            Object[] nothing = null;
            for (int i = 0; i < 100_000; i++) if (i == 99_999) nothing[0] = i;
            throw new AssertionError("no exception");
        } catch (NullPointerException e) {
            System.out.println("java " + System.getProperty("java.version") + " " + h);
        }
    }
}
